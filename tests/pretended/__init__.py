"""A pretended accelerator: CUDA devices made of torch's API and memory of this process, for tests on any machine.

It pretends at the level of torch's own API, so the daemon's code and the models run on it as they are. In a test:

    with pretended(devices=2, memory_mb=512, policy="late") as machine:
        ...                                     # torch.cuda, torch.accelerator, torch.Stream, torch.Event as of CUDA
        machine.devices[1].lose(after=3)        # see `pretended.devices.Device` for faults
        machine.devices[0].memory.failing = 2   # the next two allocations run out of memory; -1: all of them
        machine.counts["pinned_allocations"]    # what was done, see below

and for a daemon in a process of its own, `run_daemon(program=program(devices=2, control=path))`, to which a test says
`order(path, "lose", device=1, after=3)`: see `pretended.control`.

A tensor of such a device is a plain torch.Tensor of device cuda:N. Its memory is touched by the work alone that the
program issues, and a *policy* says when that is done (`pretended.work`): at once, as late as the program allows, or in
a random order. Memory that is new, and memory that was freed, is full of 0xFF: NaN in floating point. So a program that
reads an answer before the copy has come, or writes to staging memory that a copy still reads, or frees memory that
another stream reads, gets wrong numbers under "late" or "random", and no exception: tests compare values.

| module | its part |
|---|---|
| `work` | queues and policies |
| `streams` | streams and events |
| `memory` | device memory, limits, pinned memory |
| `tensors`, `operations` | tensors, and what torch's dispatcher does with them |
| `capture`, `graphs` | graphs that record and replay, and what may not be done meanwhile |
| `devices` | a machine: current devices and streams of threads, faults, the execution of work |
| `installation` | all of that in the place of torch's own, and back |
| `possible` | where all that works |
| `control`, `daemon` | daemons on a pretended machine |
| `planted` | one wrong line in the daemon's own code, to see that tests notice |

**Counts.** issued (all work), kernels, allocations, pinned_allocations, host_to_device and device_to_host (copies),
waiting_copies (those that hold the program up: blocking, or of memory that is not pinned), waits_for_values (`item`
and the like), stream_synchronize, device_synchronize, event_synchronize_spinning and _blocking (of events made with
blocking=True), empty_cache, replays, refused_in_capture, asserts.

**Errors.** A kernel that fails when it is run, by an index out of range for instance, is a device-side assert: the
device is lost. A lost device raises torch.AcceleratorError from every wait and launch. What is refused during a capture
raises, and spoils the capture, by the rules of its mode.

**Where.** On any machine whose torch was built without CUDA. Elsewhere the tests are skipped, with the reason.

**Not pretended.** Speed: elapsed times are those of the CPU that did the work. Fragmentation, the sizes of segments and
the pools of streams of torch's allocator: reserved bytes are the most that were held. The 32 streams that CUDA's pool
hands out in turn, priorities, and the order that work on stream 0 of other libraries imposes. Generators of the device
as objects, multi-process use, sparse, quantized and float8 tensors, storages but for copies,
`torch.tensor(pin_memory=True)`, autograd's own threads, torch.compile for the device, scripted code that names "cuda"
without a number. Graphs run what they captured in the order of its issue; memory pools are not shared between them.
What is missing raises `pretended.errors.Unpretended`, or torch's own error for an operator without a kernel, rather
than answer wrongly.
"""

from pretended.control import order, program
from pretended.installation import pretended
from pretended.work import POLICIES

__all__ = ["POLICIES", "order", "pretended", "program"]
