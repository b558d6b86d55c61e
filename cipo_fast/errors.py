"""Errors whose message is all a user needs, and the exit codes of the command."""

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h, "try again": a signal ended the run, its state is saved


class UserError(Exception):
    """Bad input: one line that says what, where and what to do. The command prints it and exits with code 2."""


class TrainingStopped(Exception):
    """The run cannot go on (three non-finite steps in a row, say). State is saved; exits with code 1."""


class PolicyBroken(TrainingStopped):
    """The weights are not fit to be saved: the newest checkpoint is the state to go on from."""


class Preempted(Exception):
    """A signal asked for the run's end; the message is its name. State is saved; exits with code PREEMPTED."""
