"""How answers are judged, and where programs run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cipo_fast.config.section import Positive, Section, Share


class VerifyConfig(Section):
    """How answers are judged: in worker processes that can be killed, beside generation."""

    workers: Positive | None = None
    """Answers judged at once on this node; None: as many as it has cores. More start while some are slow [ours]."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time for one answer from when a worker gets it, in seconds. On a busy machine it is time of the worker's
    own: running or asleep, not waiting for a processor. Code has the sandbox's own limits [ours]."""
    memory_mib: Annotated[int, Field(ge=256)] = 4096
    """Address space of a worker [ours]."""
    max_failed: Share = 0.01
    """Largest share of a step's answers that nobody could judge (a worker lost, a verifier's own error); they are left
    out. Above it the run stops, its state saved [ours]."""


class SandboxConfig(Section):
    """Where programs of the policy run. Limits are for one execution (one input, one call or one suite)."""

    tier: Literal["auto", "bubblewrap", "sandlock"] = "auto"
    """Who isolates: bubblewrap (namespaces), else sandlock (Landlock and seccomp); auto: the first to work [ours]."""
    unsafe_local: bool = False
    """Run programs as plain processes where neither works: they can read and write all that you can [ours]."""
    cpu_s: Annotated[float, Field(gt=0)] = 5.0
    """CPU time of one execution, in seconds [ours]."""
    wall_s: Annotated[float, Field(gt=0)] | None = None
    """Its time by the clock; None: three times cpu_s [ours]."""
    answer_s: Annotated[float, Field(gt=0)] = 60.0
    """Time by the clock for all executions of one answer together [ours]."""
    memory_mib: Annotated[int, Field(ge=64)] = 1024
    """Memory of an execution [ours]."""
    processes: Positive = 8
    """Processes and threads of an execution [ours]."""
    file_mib: Positive = 8
    """Largest file, and all files together, in MiB [ours]."""
    output_kib: Positive = 64
    """Longest output of an execution, in KiB [ours]."""
