/* crio-oci: starts the interpreter with the program, so that no container can ever write to the interpreter.
 *
 * The commands that enter a container (create, run, exec, restore) show there, for a moment, as a process whose
 * executable is this host's interpreter, and a container that runs /proc/self/exe, or opens /proc/PID/exe, has its hands
 * on that file (CVE-2019-5736).  So the interpreter is executed through a descriptor of a detached, read-only mount of
 * it, or of a sealed copy where the kernel has none: what such a link leads to cannot be opened for writing by anybody.
 *
 * In C because the alternative is an interpreter that starts another one, and that would take as long as a container.
 * PYTHON, PACKAGES and ARCHIVES (Python's words for a list and a string) are compiled in: an environment variable could make root run something else.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AT_EMPTY_PATH
#define AT_EMPTY_PATH 0x1000
#endif
#define OPEN_TREE_CLONE 1
#define ATTR_RDONLY_NOSUID_NODEV (1 | 2 | 4)
/* The same numbers on every architecture: they came after Linux 5.0. */
#define NR_OPEN_TREE 428
#define NR_MOUNT_SETATTR 442

/* Without `site`, whose finders would take longer to import than the command takes; with the modules that every command
 * has in one file, if it was made for this interpreter (see crio_native/oci/builtin/standalone/archive.py); and what a
 * process makes that lives for milliseconds needs no garbage collector. */
static const char boot[] =
    "import sys, gc, marshal\n"
    "gc.disable()\n"
    "sys.path += " PACKAGES "\n"
    "archives = " ARCHIVES "\n"
    "try:\n"
    "    with open(archives + '/loader', 'rb') as file:\n"
    "        loader = marshal.loads(file.read())\n"
    "except FileNotFoundError:\n"
    "    pass\n"
    "else:\n"
    "    exec(loader)\n"
    "    load(archives + '/start')\n"
    "from crio_native.cli.oci import main\n"
    "main(%d, archives)\n";
/* Above the descriptors that a caller passes on to the container (--preserve-fds), which are counted from 3. */
#define FIRST_OWN 64

static int enters_container(char **arguments)
{
    static const char *const verbs[] = {"create", "run", "exec", "restore"};
    for (; *arguments; arguments++)
        for (size_t i = 0; i < sizeof verbs / sizeof *verbs; i++)
            if (!strcmp(*arguments, verbs[i]))
                return 1;
    return 0;
}

/* A standard stream that the caller has closed is /dev/null, as with runc: its number would go to a file of ours, which
 * the container would then get. */
static void open_closed_streams(void)
{
    for (int number = 0; number <= 2; number++)
        if (fcntl(number, F_GETFD) < 0)
            open("/dev/null", O_RDWR); /* gets the lowest number that is free */
}

static int read_only_view(void)
{
    struct { uint64_t set, clear, propagation, userns; } attributes = {ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0};
    int tree = syscall(NR_OPEN_TREE, AT_FDCWD, PYTHON, OPEN_TREE_CLONE);
    if (tree >= 0 && syscall(NR_MOUNT_SETATTR, tree, "", AT_EMPTY_PATH, &attributes, sizeof attributes) < 0) {
        close(tree);
        tree = -1;
    }
    return tree;
}

static int sealed_copy(void)
{
    int source = open(PYTHON, O_RDONLY | O_CLOEXEC);
    int copy = memfd_create("python", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ssize_t sent = 1;
    while (source >= 0 && copy >= 0 && sent > 0)
        sent = sendfile(copy, source, NULL, 1 << 30);
    if (source < 0 || copy < 0 || sent < 0)
        return -1;
    close(source);
    return fcntl(copy, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) < 0 ? -1 : copy;
}

int main(int count, char **arguments, char **environment)
{
    char code[sizeof boot + 12];
    char *fixed[] = {PYTHON, "-I", "-S", "-c", code};
    size_t first = sizeof fixed / sizeof *fixed;
    open_closed_streams();
    char **line = calloc(first + count + 1, sizeof *line);
    if (!line) {
        fprintf(stderr, "crio-oci: no memory for %d arguments\n", count);
        return 1;
    }
    memcpy(line, fixed, sizeof fixed);
    if (count > 1)
        memcpy(line + first, arguments + 1, (count - 1) * sizeof *line);
    if (enters_container(arguments)) {
        /* The mount's descriptor stays open for now: to close the last one takes the kernel milliseconds. */
        int program = read_only_view(), view = program < 0 ? -1 : fcntl(program, F_DUPFD, FIRST_OWN);
        if (view >= 0)
            close(program);
        else
            view = program;
        program = view < 0 ? sealed_copy() : view;
        snprintf(code, sizeof code, boot, view);
        if (program >= 0)
            syscall(SYS_execveat, program, "", line, environment, AT_EMPTY_PATH);
    } else {
        snprintf(code, sizeof code, boot, -1);
        execve(PYTHON, line, environment);
    }
    fprintf(stderr, "crio-oci: the interpreter %s cannot be executed: %s\n", PYTHON, strerror(errno));
    return 1;
}
