"""The built-in executor as a program of its own, `crio-oci`: runc's command line, and no process that stays.

`create` is for a moment the parent of the container's init, which then belongs to whoever reaps orphans (an engine's
monitor); everything that is known of a container is in its directory below `--root` (see `state`), so that any later
command, or a stranger with `ls`, finds it.  The plan and its steps are the same as the daemon's: `plan`, `init` and
`steps` beside this package.

Engines start `crio-oci` several times a container, and most of what that costs is the start itself: modules here
import what their command needs, and neither typing, dataclasses, re, json nor socket on the usual ways.

verbs      the commands and their flags, as data
archive    the modules of a command from one file
options    the parser of the command line
state      a container's directory, its status, the json that is read
channel    the socket between the init and those who made it or start it
create     create, run; the container is made here
child      what create and exec share: the process that they clone
exec       exec
control    start, kill, delete, pause, resume, state
resources  update, events, ps
show       list, spec, features
terminal   console sockets, a terminal in the foreground, signals that are passed on
laboratory --trace and --fail
checkpoint checkpoint and restore, by CRIU
"""
