"""Trial of a version, when it is loaded: it is run, to find out what may be promised about it.

trial.py      the trial, in order
asking.py     forwards of a trial
examples.py   inputs to run it with
held.py       state that a module keeps between two forwards, and the changes that a forward makes
suspects.py   state that its Python code may change, though no trial has seen it
state.py      whether an answer depends on earlier requests: pure, scratch or stateful
rows.py       whether each request gets the same answer in a batch as alone
verdict.py    the outcome of a trial
undo.py       the writes of forwards, put back
copies.py     calls that let nothing cross from one request to another
isolation.py  the choice of the calls that lanes get
company.py    whether lanes answer as the trial did, at the same time
warmup.py     batches of growing size: their cost, and how large they may be
graphing.py   batches that are worth a graph
host_waits.py operators that no graph can hold
"""
