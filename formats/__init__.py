"""Which files can this code open? For readers who want to load, convert or export a checkpoint.

    json_files.py     read and write JSON, with errors of one line
    folders.py        find a model's folder or fetch it; write a folder whole or not at all
    weight_files.py   tensors of safetensors and .bin files, in one file or in shards
    configs.py        check a config; read and write those of Hugging Face
    name_rules.py     names of tensors in other checkpoints -> names here
    tokenizer.py      text to ids and back; sentencepiece.py reads Llama's tokenizer.model
    llava.py          open LLaVA-1.5 and VLoRA as their authors publish them
    lora.py           LoRA folders of LLaVA: changes to add to the weights of a base
    export.py         write CLIP, Llama and LLaVA for transformers
    answers.py        the questions and answers of sample.py; runs.py finds a finished run

weights.py builds models from these. Next: json_files.py.
"""
