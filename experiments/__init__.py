"""Why is it built so? The papers' tables in miniature, speed, and pictures drawn by other code.

    ablate.py      trains the rows of a table and compares them; starts the others
    tables.py      what the rows are
    report.py      scores, costs, Markdown and plots
    embeddings.py  what the guidance's embeddings tell about the question
    bench.py       speed of training, answering and loading; what it measures is in speed/
    growth.py      how time and memory grow with positions, turns, rows, E and R
    gpu_check.py   all that only a GPU can tell, in nine minutes; started by gpu_check.sh
    outsider.py    scores on pictures drawn by other code
    processes.py   programs in processes of their own
"""
