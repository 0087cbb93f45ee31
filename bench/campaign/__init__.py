"""`python -m bench gpu`: what a short loan of a GPU should answer, most valuable first.

`steps.py` lists the steps and what each may take. `run.py` takes them in order, each in a process of its own
(`one.py`), so that a fault on the device ends one step alone. Everything that is found goes into one file, which later
calls continue. `--dry` rehearses all of it where there is no GPU (`site.py`), and no figure of a rehearsal can be taken
for one of a GPU.
"""
