"""Models in plain Python: the class `Model` of a model.py, in a thread of the daemon or in processes of its own.

instance.py        an object of the class: what it has to be, and how it is called
methods.py         what its methods have to be
workers.py         threads for what is done with each row
module.py          the torch modules that stand before it, for executors
processes.py       the processes of a version: one for each replica, started again when it ends
process.py         one of them, as the daemon sees it
printed_lines.py   what it prints, on its way to the log
channel.py         arrays and messages between the daemon and a process
child.py           one of them, from within
failures.py        errors of a process, which say nothing about a single request

`instance`, `workers`, `channel` and `child` import no torch: a process whose model does not need it takes a fraction of
the memory, and of the time to start.
"""
