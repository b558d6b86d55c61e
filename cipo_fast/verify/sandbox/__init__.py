"""Runs programs of the policy where they can do no harm, and returns what they computed: values, never verdicts.

A `Sandbox` keeps one zygote: a process in a sandbox of its own, with Python loaded, that forks an execution a request.
Each execution is used once, isolated from the zygote and from all others, and ended with all that it started.
"""

from cipo_fast.verify.sandbox.choosing import choose as choose
from cipo_fast.verify.sandbox.client import Call as Call
from cipo_fast.verify.sandbox.client import Result as Result
from cipo_fast.verify.sandbox.client import Sandbox as Sandbox
from cipo_fast.verify.sandbox.tiers import Tier as Tier
