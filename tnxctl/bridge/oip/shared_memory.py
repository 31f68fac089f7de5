"""System shared memory of the Open Inference Protocol: regions of POSIX shared memory that clients register, and name.

A region is a file that its client has made in /dev/shm. The bridge reads and writes it by calls of the system and maps
nothing, since who has a file can shorten it at any time: that is an error here, and would be SIGBUS in a mapping. Each
input is read once, before anything looks at it.

Whoever reaches the bridge names files that the bridge's user can open. So an operator has to allow it, with a prefix
that the names of such files have.
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tnxctl.bridge.bodies import Budget
from tnxctl.protocol.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from tnxctl.protocol.limits import excerpt

DIRECTORY = "/dev/shm"
"""Where Linux has POSIX shared memory."""

_KEY = re.compile(r"/?([^/\0]{1,255})")
_MOST_REGIONS = 256  # each has a descriptor, and a process often no more than 1,024
_MOST_NAME = 255  # characters


class Place(NamedTuple):
    """Part of a region, where a tensor lies."""

    region: str
    offset: int
    nbytes: int

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that say so."""
        offset = {"shared_memory_offset": self.offset} if self.offset else {}
        return {"shared_memory_region": self.region, "shared_memory_byte_size": self.nbytes, **offset}


class Region(NamedTuple):
    """Region that is registered. Attributes: descriptor: of its file. The others as the protocol has them."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int

    @property
    def document(self) -> dict[str, Any]:
        """Its status, as the protocol has it."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}


class Target(NamedTuple):
    """Place of an output. Attributes: opened: the region that had this name when the request came."""

    place: Place
    opened: Region


def place_of(parameters: Mapping[str, Any], name: str) -> Place | None:
    """The place that the parameters of a tensor give; None if it is not in shared memory.

    Raises:
        InvalidArgument: one of them has a value that it cannot have.
    """
    if "shared_memory_region" not in parameters:
        return None
    region = parameters["shared_memory_region"]
    offset, nbytes = parameters.get("shared_memory_offset", 0), parameters.get("shared_memory_byte_size", 0)
    if type(region) is not str:
        raise InvalidArgument(f"tensor {excerpt(name)}: shared_memory_region is {excerpt(region)}, expected a name")
    for value in (offset, nbytes):
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise InvalidArgument(
                f"tensor {excerpt(name)}: offset or size in shared memory is {excerpt(value)}, expected a whole number"
            )
    return Place(region, offset, nbytes)


class Regions:
    """Regions that are registered with one bridge.

    Args:
        prefix: of the names of files that may be; None: there is no shared memory.
        budget: of memory for requests, for which what is read counts as long as it is there.
    """

    def __init__(self, prefix: str | None, budget: Budget) -> None:
        self._prefix = prefix
        self._budget = budget
        self._regions: dict[str, Region] = {}

    @property
    def allowed(self) -> bool:
        """Whether there is shared memory."""
        return self._prefix is not None

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region.

        Args:
            key: name of its file. offset, byte_size: of the region within the file.

        Raises:
            Unimplemented: there is no shared memory.
            InvalidArgument: the name is too long, the key may not be used, there is no such file, or the region is not
                within it.
            AlreadyExists: there is a region of that name.
            FailedPrecondition: there are too many.
        """
        prefix = self._prefix_of_all()
        if name in self._regions:
            raise AlreadyExists(f"shared memory region {excerpt(name)} already in manager")
        if len(self._regions) >= _MOST_REGIONS:
            raise FailedPrecondition(f"{_MOST_REGIONS} shared memory regions are registered, which is the limit")
        if not 0 < len(name) <= _MOST_NAME:
            raise InvalidArgument(f"shared memory region {excerpt(name)}: a name has 1 to {_MOST_NAME} characters")
        found = _KEY.fullmatch(key)
        if found is None or found[1] in (".", "..") or not found[1].startswith(prefix):
            raise InvalidArgument(
                f"shared memory region {excerpt(name)}: its key {excerpt(key)} does not begin with {prefix!r}"
            )
        try:
            # Not blocking, for a pipe of that name; and no link, which may lead to what is not meant.
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(os.path.join(DIRECTORY, found[1]), flags)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such name"
            raise InvalidArgument(f"unable to open shared memory region {excerpt(name)}: {reason}") from None
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or min(offset, byte_size) < 0 or offset + byte_size > state.st_size:
            os.close(descriptor)
            raise InvalidArgument(
                f"shared memory region {excerpt(name)}: {byte_size} bytes from {offset} on are not within the "
                f"{state.st_size} of {excerpt(key)}"
            )
        self._regions[name] = Region(name, key, offset, byte_size, descriptor)

    def unregister(self, name: str = "") -> None:
        """Forget a region, if it is there; "": all. Raises Unimplemented."""
        self._prefix_of_all()
        for each in [name] if name else [*self._regions]:
            region = self._regions.pop(each, None)
            if region is not None:
                os.close(region.descriptor)

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """Status of a region; "": of all. Raises NotFound."""
        if not name:
            return [region.document for region in self._regions.values()]
        return [self._find(name).document]

    def read(self, place: Place, name: str, most_bytes: int) -> memoryview:
        """A copy of what lies in a place.

        Args:
            name: of the tensor. most_bytes: that it may have.

        Raises:
            Unimplemented: there is no shared memory.
            InvalidArgument, NotFound: there is no such place, or no more.
            Unavailable: there is no memory for it now.
        """
        region = self._within(place, name)
        if place.nbytes > most_bytes:
            raise InvalidArgument(f"tensor {excerpt(name)} has {place.nbytes} bytes, the limit is {most_bytes}")
        content = np.empty(place.nbytes, np.uint8)  # first: what it could not have is not held either
        self._budget.hold(place.nbytes)
        weakref.finalize(content, self._budget.release, place.nbytes)
        try:
            count = os.preadv(region.descriptor, [content.data], region.offset + place.offset)
        except OSError as error:
            raise InvalidArgument(f"tensor {excerpt(name)}: cannot be read: {error.strerror}") from None
        if count < place.nbytes:
            raise InvalidArgument(f"tensor {excerpt(name)}: its shared memory has been shortened")
        return content.data

    def target(self, place: Place, name: str) -> Target:
        """The place of an output that will come. Raises as `read` does."""
        return Target(place, self._within(place, name))

    def write(self, target: Target, name: str, content: memoryview) -> Place:
        """Write an output to its place. Returns the part that it takes. Raises as `read` does, and if it is larger."""
        place, region = target
        if self._regions.get(place.region) is not region:  # another's by now, maybe
            raise NotFound(f"output {excerpt(name)}: its shared memory region was unregistered meanwhile")
        if len(content) > place.nbytes:
            raise InvalidArgument(
                f"output {excerpt(name)} has {len(content)} bytes, and its place in shared memory {place.nbytes}"
            )
        at = region.offset + place.offset
        try:
            if at + len(content) > os.fstat(region.descriptor).st_size:
                raise InvalidArgument(f"output {excerpt(name)}: its shared memory has been shortened")
            count = os.pwrite(region.descriptor, content, at)
        except OSError as error:
            raise InvalidArgument(f"output {excerpt(name)}: cannot be written: {error.strerror}") from None
        if count < len(content):
            raise InvalidArgument(f"output {excerpt(name)}: only {count} of its bytes could be written")
        return place._replace(nbytes=len(content))

    def _prefix_of_all(self) -> str:
        if self._prefix is None:
            raise Unimplemented("the server does not support shared memory")
        return self._prefix

    def _find(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"unable to find shared memory region {excerpt(name)}")
        return region

    def _within(self, place: Place, name: str) -> Region:
        if self._prefix is None:
            raise Unimplemented(f"tensor {excerpt(name)} is in shared memory, which this server does not support")
        region = self._find(place.region)
        if place.offset + place.nbytes > region.byte_size:
            raise InvalidArgument(
                f"tensor {excerpt(name)}: {place.nbytes} bytes from {place.offset} on are not within the "
                f"{region.byte_size} of shared memory region {excerpt(place.region)}"
            )
        return region
