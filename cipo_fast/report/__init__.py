"""A run's files become one page that opens from the disk: `python -m cipo_fast.report`.

files.py      lenient reading: what is torn or of another format is named, and left out
run.py        overview and curves of one run        rollouts.py  a sample of what the policy wrote, as trees
problems.py   held-out problems, one by one         page.py      all runs as one document, and the document as HTML
static/       the page itself: HTML, CSS, JavaScript, and uPlot (MIT), which draws the charts
"""
