"""The list of a contest's runs."""

from contest_cases import with_start


def test_the_list_says_what_has_finished(call, faked, path, tmp_path) -> None:
    with_start(path)
    path.write_text("rate_seed = 7\n" + path.read_text())

    def listed() -> list[str]:
        out, code = call("--list")
        assert not code
        return [line.partition("seeds 1, 2; ")[2] or line.rpartition("; ")[2]
                for line in out.splitlines()]  # fmt: skip

    assert listed() == ["nothing has finished"] * 4
    assert not (tmp_path / "out/contest.json").exists()
    faked.failing = ("dense,lr=0.002,seed=7", "window,lr=0.002,seed=2")
    call("--arms", "dense", "window")
    assert listed() == [
        "finished: seeds 7, 1, 2",
        "finished: 1 of 2 runs that choose the rate",
        "finished: seed 1",
        "nothing has finished",
    ]
    faked.failing = ()
    call()
    chosen = "finished: 2 of 2 runs that choose the rate, which is 0.002; seeds 1, 2"
    assert listed() == ["finished: seeds 7, 1, 2", chosen, *["finished: seeds 1, 2"] * 2]


def test_the_list_says_that_one_seed_gives_no_verdict(call, path) -> None:
    before = call("--list")[0]
    path.write_text(path.read_text().replace("seeds = [1, 2]", "seeds = [1]"))
    out, code = call("--list")
    assert not code and "no verdict" not in before
    assert out.splitlines()[-1] == f"{path}: one seed gives no verdict; name two or more in seeds"
