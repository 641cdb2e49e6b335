"""How is it scored? The toy, the papers' benchmarks, and ways to take the experts away.

tasks.py is the table of benchmarks; run.py runs them.
"""
