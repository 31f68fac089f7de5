"""State of the process that all models share: changes by one model's code are found, undone, and named.

    with settings_restored("building it") as changes:   around reading a model, its build and its warm-up
        ...
    changes.note()                          "building it changed torch's default dtype: put back"

    detector = SideEffectDetector()         around each of several forwards
    with detector:
        module(x)
    detector.complaint()                    what it changes every time

    monitor = DriftMonitor()                on the thread that serves; costs requests nothing
    monitor.restore()                       at times: restores what has drifted

| file | |
|---|---|
| setting.py, torch_settings.py, python_settings.py | the settings, and how each is read and written |
| affinity.py | the cores of a thread, apart from those that an operator gives the process |
| snapshot.py | values of settings at one time, and their restoration |
| random_state.py | the shared random generators |
| setter_calls.py | calls of functions that set a shared state, recorded while a forward runs |
| monkey_patches.py | functions of torch that code has replaced |
| restoration.py, side_effects.py, drift.py | the three uses above: around a step, around forwards, while models serve |

A setting is compared before and after, so a change that the code itself undoes does not count. The calls that
`setter_calls` records are an exception: forwards of other models would run with another default dtype, or with numbers
that were seeded.

**Limits.** Python code can change anything in its process, and this is a list of what models are known to change, not a
sandbox. Models are built while others serve: from a change until the end of the step that made it, import or build,
forwards of other models run with it. That cannot be had otherwise, for the code that sets float64 as default may need
it to build its network. TensorNext's own code on the way of a request says datatype and device of every tensor that it
makes, and depends on none of this. A setting of a thread, such as the grad mode, is seen only on the thread that the
code ran on: the thread that loads, that of a trial, or that of the serving loop. Settings in C that have no getter,
such as the handlers of faulthandler.register, are not seen. A signal handler can be restored on the main thread alone:
elsewhere its change is found, and the drift monitor restores it.

**Monkey patches**: functions of torch that code replaces are restored, and the step has failed: with the originals, the
code that replaced them would mean something else.

**Random numbers** are drawn by models that sample, and drawing is no change. Seeding is: all models would draw the same
numbers from then on. After a step that has seeded, torch's generators get a seed from the system again, not their old
state: lanes that sample have drawn from it meanwhile, and would draw it all twice. Python's and numpy's generators,
which tell nothing of seeds, get one whenever they were used at all. A forward that seeds a generator that all share is
refused: `torch.Generator` gives it one of its own.

No name is imported here: `monkey_patches` has to be imported before the code of any model, and by modules that the
others import.
"""
