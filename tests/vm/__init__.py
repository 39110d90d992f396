"""The second kernel: tests marked ``vm`` run inside a user-mode-linux guest that one pytest session boots once.

Here belong the rig (`packages` fetches, `guest` boots, `init` is the guest's first process, `plugin` is pytest's
side, `conftest` the daemon in there) and the tests that need cgroup v2 or a kernel with a security module.  Tests that
the host's kernel can serve do not.

    @pytest.mark.vm                              cgroup v2, no security module
    @pytest.mark.vm(cgroup="v1")                 or "hybrid"
    @pytest.mark.vm(lsm="apparmor")              or "selinux"; with a policy: memory="1025M", a boot of its own
    @pytest.mark.vm(memory="1500M")              the guest's memory, default 1024M

There is one boot for each distinct configuration in a session, of 2 to 3 seconds.  What the guest is like:

- Its root is the host's root, read-only; /tmp (so `tmp_path`) and /run are empty tmpfs, and the checkout is where it
  is outside.  Nothing that a test does in there reaches the host.
- It is root with every capability, has one cpu, and no network but loopback.
- A system call costs about 100 times the host's, a fork 35, a spawn 20: few processes, few imports.
"""
