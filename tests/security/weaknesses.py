"""The executor with one defence taken out, to show that each attack is one: it must succeed against such a build.

A weakness is a function of two halves: what it changes in the launcher (from which every container's init is cloned),
and what in the daemon's process, the test's own.  `BOOT` makes a launcher that applies one before it serves.  This
module runs in the launcher too, where there is nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable

LAUNCHER: dict[str, Callable[[], None]] = {}

LEAK = 100  # number of a descriptor that should not be there

BOOT = (
    "import sys; sys.path += sys.argv[3:]; from tests.security import weaknesses; weaknesses.apply({!r}); "
    "from crio_native.oci.builtin.launcher import main; main()"
)


def apply(name: str) -> None:
    """In a launcher: take the defence out.  "without STEP" makes a step do nothing."""
    if name.startswith("without "):
        replace_step(name.removeprefix("without "), lambda context, **arguments: None)
    else:
        LAUNCHER[name]()


def in_launcher(function: Callable[[], None]) -> Callable[[], None]:
    LAUNCHER[function.__name__] = function
    return function


def replace_step(name: str, act: Callable[..., None]) -> None:
    from crio_native.oci.builtin import steps

    if name not in steps.STEPS:
        raise SystemExit(f"there is no step {name!r} to weaken")
    steps.STEPS[name] = act


def replace_function(name: str, act: Callable[..., object]) -> None:
    """Every function of that name in the modules of the steps."""
    from crio_native.oci.builtin import steps  # noqa: F401  loads them

    found = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("crio_native.oci.builtin") and callable(getattr(module, name, None))
    ]
    if not found:
        raise SystemExit(f"there is no function {name!r} to weaken")
    for module in found:
        setattr(module, name, act)


# -- resolving paths ---------------------------------------------------------------------------------------------


def text_of(root: int, path: str) -> str:
    return os.readlink(f"/proc/self/fd/{root}").rstrip("/") + "/" + path.lstrip("/")


def resolve_by(check: Callable[[str, str], None]) -> None:
    """Paths in the container as text, resolved by the kernel from the host's root."""
    from crio_native.linux import inroot

    def open_in_root(root: int, path: str, flags: int, mode: int = 0) -> int:
        check(text_of(root, ""), text_of(root, path))
        return os.open(text_of(root, path), flags | os.O_CLOEXEC, mode)

    def make_directories(root: int, path: str, mode: int = 0o755, links: int = 0) -> int:
        check(text_of(root, ""), text_of(root, path))
        os.makedirs(text_of(root, path), mode, exist_ok=True)
        return os.open(text_of(root, path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def make_file(root: int, path: str, mode: int = 0o644, links: int = 0) -> int:
        os.makedirs(os.path.dirname(text_of(root, path)), exist_ok=True)
        os.close(os.open(text_of(root, path), os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, mode))
        return os.open(text_of(root, path), os.O_PATH | os.O_CLOEXEC)

    inroot.open_in_root, inroot.make_directories, inroot.make_file = open_in_root, make_directories, make_file


@in_launcher
def paths_as_text() -> None:
    resolve_by(lambda root, path: None)
    mounts_into_proc()


@in_launcher
def check_then_use() -> None:
    """Looks first where a path leads, as one did before openat2: between the look and the use it may lead elsewhere."""

    def check(root: str, path: str) -> None:
        if not os.path.realpath(path).startswith(root.rstrip("/")):
            raise PermissionError(1, "leads out of the root", path)
        time.sleep(0.0005)  # as if others had work to do, too

    resolve_by(check)
    mounts_into_proc()


@in_launcher
def mounts_into_proc() -> None:
    from crio_native.linux import inroot

    def target(context: object, destination: str, directory: bool, *, exact: bool = False, follow: bool = True) -> int:
        make = inroot.make_directories if directory else inroot.make_file
        return make(context.root, destination)  # type: ignore[attr-defined]

    replace_function("_target", target)


# -- descriptors and the interpreter -----------------------------------------------------------------------------


@in_launcher
def dumpable() -> None:
    import _prctl  # type: ignore[import-not-found]

    from crio_native.linux import syscalls

    for module in (_prctl, syscalls):  # the launcher's, and that of who enters a container

        def prctl(option: int, *values: int, call: Callable[..., object] = module.prctl) -> object:
            return None if option == syscalls.PR_SET_DUMPABLE else call(option, *values)

        module.prctl = prctl  # type: ignore[union-attr]


@in_launcher
def leaked_descriptor() -> None:
    """A directory of the host stays open, and nothing closes it."""
    from crio_native.linux import syscalls

    close_range = syscalls.close_range

    def sparing(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
        if first < LEAK:
            close_range(first, min(last, LEAK - 1), flags)
        if last > LEAK:
            close_range(max(first, LEAK + 1), last, flags)

    # A high number: the low ones are given to others on the way.
    os.dup2(os.open("/", os.O_RDONLY | os.O_DIRECTORY), LEAK)
    syscalls.close_range = sparing


@in_launcher
def unchecked_directory() -> None:
    leaked_descriptor()
    replace_step("make_working_directory", lambda context, path: None)
    replace_step("change_directory", lambda context, path: os.chdir(path))


# -- masks, devices, kernel files --------------------------------------------------------------------------------


@in_launcher
def unproven_null() -> None:
    """Whatever the image calls /dev/null covers the masked files."""
    from crio_native.linux import inroot, syscalls
    from crio_native.oci.builtin import steps

    flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_EMPTY_PATH
    make = steps.STEPS["make_devices"]

    def make_devices(context: object, nodes: list[dict[str, object]]) -> None:
        for node in nodes:
            try:
                make(context, nodes=[node])
            except Exception:  # it is there: good enough
                continue

    def mask_paths(context: object, paths: list[str]) -> None:
        root = context.root  # type: ignore[attr-defined]
        for path in paths:
            try:
                target = inroot.open_in_root(root, path, os.O_PATH)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(os.fstat(target).st_mode):
                null = inroot.open_in_root(root, "/dev/null", os.O_PATH)
                syscalls.move_mount(syscalls.open_tree(null, "", flags), target)

    replace_step("make_devices", make_devices)
    replace_step("mask_paths", mask_paths)


@in_launcher
def late_sysctls() -> None:
    """Kernel settings are written when the container's own /proc is in view."""
    from crio_native.oci.builtin import steps

    pivot = steps.STEPS["pivot_root"]
    wanted: dict[str, str] = {}

    def set_sysctls(context: object, values: dict[str, str]) -> None:
        wanted.update(values)

    def pivot_root(context: object) -> None:
        pivot(context)
        for name, value in wanted.items():
            os.write(os.open("/proc/sys/" + name.replace(".", "/"), os.O_WRONLY), value.encode())

    replace_step("set_sysctls", set_sysctls)
    replace_step("pivot_root", pivot_root)


@in_launcher
def writable_cgroups() -> None:
    from crio_native.oci.builtin import steps

    for name in ("cgroup_v1", "mount"):
        act = steps.STEPS[name]

        def writable(context: object, act: Callable[..., None] = act, **arguments: object) -> None:
            if arguments.get("fstype", "cgroup2") == "cgroup2":
                arguments |= {"set": 0} if "set" in arguments else {"flags": 0}
            act(context, **arguments)

        replace_step(name, writable)


# -- users and privileges ----------------------------------------------------------------------------------------


@in_launcher
def inheritable_capabilities() -> None:
    from crio_native.oci.builtin import steps

    act = steps.STEPS["set_capabilities"]

    def set_capabilities(context: object, **masks: int) -> None:
        act(context, **{**masks, "inheritable": masks["permitted"]})

    replace_step("set_capabilities", set_capabilities)


@in_launcher
def unbounded_files() -> None:
    from crio_native.linux import inroot

    def read_file(root: int, path: str, limit: int) -> bytes:
        with open(inroot.open_in_root(root, path, os.O_RDONLY), "rb") as file:
            return file.read()

    inroot.read_file = read_file


@in_launcher
def wrapping_numbers() -> None:
    from crio_native.oci.builtin import users

    users._number = lambda text: int(text) & 0xFFFFFFFF if text.isdigit() else None


@in_launcher
def names_before_numbers() -> None:
    from crio_native.oci.builtin import users

    find_entry, find_group = users._find_entry, users._find_group

    def entry(passwd: list[list[str]], name: str) -> tuple[str, int, int, str] | None:
        named = [(login, int(uid), int(gid), home) for login, _, uid, gid, _, home, *_ in passwd if login == name]
        return named[0] if named else find_entry(passwd, name)

    def group(groups: list[list[str]], name: str) -> int:
        named = [int(record[2]) for record in groups if record[0] == name]
        return named[0] if named else find_group(groups, name)

    users._find_entry, users._find_group = entry, group


@in_launcher
def forgotten_group() -> None:
    from crio_native.oci.builtin import users

    find = users.find

    def careless(*arguments: object) -> users.User:
        user = find(*arguments)  # type: ignore[arg-type]
        return users.User(user.uid, user.gid, tuple(group for group in user.groups if group != user.gid), user.home)

    users.find = careless  # type: ignore[assignment]


# -- the daemon's side -------------------------------------------------------------------------------------------


def unchecked_config() -> contextlib.AbstractContextManager[object]:
    from unittest import mock

    from crio_native.oci import spec

    return mock.patch.object(spec, "validate", lambda config: None)


def writable_interpreter() -> contextlib.AbstractContextManager[object]:
    from unittest import mock

    from crio_native.linux import process

    return mock.patch.object(process, "unwritable_executable", lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def any_process() -> contextlib.AbstractContextManager[object]:
    """An exec trusts the pid alone, whoever has it by now."""
    from unittest import mock

    from crio_native.linux import process

    return mock.patch.object(process, "start_time", lambda pid: mock.ANY)


def early_appearance() -> contextlib.AbstractContextManager[object]:
    """Every exec is born in the container's PID namespace, with the memory of its donor."""
    from unittest import mock

    from crio_native.oci.builtin import plan

    return mock.patch.object(plan, "_watched", lambda request, namespaces: False)


DAEMON: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    function.__name__: function for function in (unchecked_config, writable_interpreter, any_process, early_appearance)
}
