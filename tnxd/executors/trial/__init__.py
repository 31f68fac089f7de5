"""The trial of a version, when it is loaded: what can be promised about it is found out by running it.

trial.py      all of it, in order
asking.py     forwards of a trial
examples.py   inputs to run it with
held.py       what a module keeps between two forwards, and what a forward changes of that
suspects.py   what its Python code may change, though no trial has seen it
state.py      whether an answer depends on earlier requests: pure, scratch or stateful
rows.py       whether a batch gives each request what it would have got alone
verdict.py    what may be promised
undo.py       what forwards write, put back
copies.py     calls that let nothing cross from one request to another
isolation.py  which of them each lane gets
company.py    whether lanes answer as the trial did, at the same time
warmup.py     what batches cost, and how large they may be
"""
