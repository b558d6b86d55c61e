"""Errors whose message is all a user needs."""


class UserError(Exception):
    """Bad input: one line that says what, where and what to do. The command prints it and exits with code 2."""


class TrainingStopped(Exception):
    """The run cannot go on (three non-finite steps in a row, say). State is saved; exits with code 1."""


class PolicyBroken(TrainingStopped):
    """The weights are not fit to be saved: the newest checkpoint is the state to go on from."""


class RankFailure(TrainingStopped):
    """An exception that nobody foresaw, told on every rank; on the rank that met it, it is the `__cause__`."""


class EngineFailure(Exception):
    """The engine did not do what it was asked. A fresh one with the same weights can be asked again."""
