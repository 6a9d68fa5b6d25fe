"""Words of a command line, and of what tyro says about a wrong one."""

import re

FLAG = re.compile(r"--[A-Za-z_]")


def first_part_of_box(text: str) -> str:
    """The words of tyro's box between its heading and its next rule; the rest explains the key.

    The heading interrupts the upper edge of the box, or comes before it where lines are plain.
    """
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        words = line.strip(" │")
        if words.startswith("╭") or (words and set(words) <= set("─-├┤╰╯")):
            parts.append([])
        elif words:
            parts[-1].append(words)
    return " ".join(parts[1] if len(parts) > 1 else parts[0])


def keys_given(arguments: list[str]) -> set[str]:
    """section.key of every flag of a trainer's command line, which may be spelt with dashes."""
    flags = (word[2:].partition("=")[0] for word in arguments if word[:2] == "--")
    return {flag.replace(".no-", ".").replace("-", "_") for flag in flags}


def with_a_second_value(args: list[str]) -> str:
    """The first flag of a command line that more than one word follows, or nothing."""
    flag, values = "", 0
    for word in args:
        is_flag = bool(FLAG.match(word))
        flag, values = (word, 0) if is_flag else (flag, values + 1)
        if values > 1:
            return flag
    return ""
