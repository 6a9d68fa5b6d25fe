"""Names, signals and times that the launcher and its training processes agree on.

They stand here because the trainer's package imports torchtitan, which would take the launcher
seconds, and the package of the method knows of no launch.
"""

import signal

# This environment variable holds the launcher's process id. The launcher prints the report.
LAUNCHER = "LIGHTHOUSE_LAUNCHER"
# A training process marks its report to the launcher with this key if a user can mend the error.
USERS_MISTAKE = "users_mistake"
# It marks the report with this key if a signal stopped it.
STOPPED = "stopped"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launcher, scheduler and terminal may each pass on one signal. Those within a second are one.
SECONDS_OF_ONE_SIGNAL = 1.0
