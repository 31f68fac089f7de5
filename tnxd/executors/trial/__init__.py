"""The trial of a version, when it is loaded: what can be promised about it is found out by running it.

examples.py   inputs to run it with
held.py       what a module keeps between two forwards, and what a forward changes of that
suspects.py   what its Python code may change, though no trial has seen it
state.py      whether an answer depends on earlier requests: pure, scratch or stateful
rows.py       whether a batch gives each request what it would have got alone
company.py    whether lanes answer as the trial did, at the same time
undo.py       what forwards write, put back
copies.py     what each lane calls, so that nothing crosses from one request to another
trial.py      all of it, in order
"""
