"""What is asked of the verifiers before a run begins: is there a sandbox, and does it pay for exploits?"""

from __future__ import annotations

from collections.abc import Iterable

from cipo_fast.distributed import on_main, together
from cipo_fast.errors import TrainingStopped
from cipo_fast.records import Problem
from cipo_fast.tasks import Say
from cipo_fast.verify.pool import Judges


def try_out(judges: Judges, problems: Iterable[Problem], say: Say) -> None:
    """For a run with programs: choose the sandbox, say which, and have exploits judged by the run's verifiers. Raises
    UserError where no sandbox works, TrainingStopped where an exploit is paid or an honest program is not. A
    collective."""
    verifiers = {problem.verifier for problem in problems}
    if "code" not in verifiers:
        return
    from cipo_fast.audit.canaries import BUILT_IN, failures, run_canaries

    together(judges.choose_tier)

    def refuse_paid() -> None:
        failed = failures(run_canaries(judges, [name for name in BUILT_IN if name in verifiers], say))
        if failed:
            names = ", ".join(canary.name for canary, _ in failed[:3])
            raise TrainingStopped(
                f"{len(failed)} canaries failed ({names}): what the verifiers pay for would be learned; "
                "`python -m cipo_fast.audit` tells more"
            )

    on_main(refuse_paid)
