"""What `python -m experiments.bench` measures, each in a file.

    shapes.py    the sizes; random models, ours and transformers', with the same weights
    clock.py     two sides in turns, peaks of memory, floors, rows
    models.py    a prompt, further tokens, a training step; experts against none
    inputs.py    pictures to pixels, conversations to ids
    loading.py   a checkpoint, sample.py's start
    stages.py    both stages of train.py

And what ../gpu_check.py runs: gpu.py holds its parts, correct.py what must hold on every device.
"""
