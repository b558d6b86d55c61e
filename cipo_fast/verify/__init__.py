"""How an answer is judged: (row, response) -> Judgement. Knows nothing of tasks, models or training.

A row is a plain JSON object, the same in training and in the judge's input: `verifier` (exact, math, code or
path/to/file.py:function) and what that verifier reads, such as `answer` or `tests`.
"""

from cipo_fast.verify.verdict import Judgement as Judgement
from cipo_fast.verify.verdict import Verdict as Verdict
from cipo_fast.verify.verdict import VerifierFailure as VerifierFailure
