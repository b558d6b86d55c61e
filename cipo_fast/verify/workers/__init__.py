"""Answers are judged in processes that can be killed: the pool, the thread that hands out, the nursery of workers."""
