"""Controlled experiments: a grid of settings and seeds, run one after another or several at once, and compared.

grid.py      the file, and the runs it asks for     results.py   what runs have left, and figures with intervals
runner.py    each run in a process of its own       report.py    results.md, results.json
                                                    plots.py     learning curves, differences to the control
"""
