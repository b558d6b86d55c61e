"""The embedded tasks, a file each: what is asked, one right answer, and near misses of it.

trace         the answer first and its working after it: an attempt holds what one pass could not know; the default
sort, add     one pass can do what a second could; the first tasks, and controls for the others
carry         addition written from the front: a digit waits for carries from behind it
chain         k hops through a map: an attempt is a state, with hops left
shoot         a boundary value: the path from a guessed first value misses the last one by what the guess is off
subset        3 digits of a given sum: many right answers, and a near miss leaves a residual
latin         a 4x4 Latin square with blanks: what is wrong is seen in a row or a column

`python -m cipo_fast.embedded data.task=NAME` makes the problems' files. What each is good for was measured:
docs/results/regimes-exploration.md.
"""

from cipo_fast.embedded.tasks.task import Task, task_named

__all__ = ["Task", "task_named"]
