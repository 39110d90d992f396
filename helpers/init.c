/*
 * The container's first process (the init): reaping it and its orphans, killing it, and telling how it ended.
 */
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct {
	pid_t pid, donor;   /* donor: the process that the init is born of and whose memory it has; 0 when there is none */
	bool ended, execed; /* execed: known once it has ended */
	int status;
	long long finished_at;
} init;

pid_t init_pid(void)
{
	return init.pid;
}

void init_expect(pid_t donor)
{
	init.donor = donor;
}

/* False when pid is not a child of this process; then nothing may ever be done to it. */
bool init_adopt(pid_t pid)
{
	siginfo_t info;

	if (pid <= 0 || waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
		return false;
	init.pid = pid;
	return true;
}

static void await_donor(void)
{
	while (init.donor && waitpid(init.donor, &init.status, 0) < 0 && errno == EINTR)
		;
	init.donor = 0;
}

/*
 * The init has been born: a child of this process, like its donor; or of the donor, which then ends and leaves it to
 * the nearest subreaper, which is this process.  False when it is neither.
 */
bool init_born(pid_t pid)
{
	if (init.pid)
		return false;
	if (!init_adopt(pid)) {
		await_donor();
		if (!init_adopt(pid))
			return false;
	}
	init_reap(); /* its SIGCHLD may have been read already */
	return true;
}

/* Lest it bears an init now.  One that has borne an init sleeps until that executes its program, or dies. */
void init_end_donor(void)
{
	if (init.donor)
		kill(init.donor, SIGKILL);
	await_donor();
}

static ssize_t read_file(int fd, char *data, size_t room)
{
	ssize_t size = pread(fd, data, room - 1, 0);

	data[size > 0 ? size : 0] = 0;
	return size;
}

/*
 * Whether a process has executed anything since it was cloned.  It tells a successful execve of the init from its
 * death, both of which close its sync socket: the kernel clears PF_FORKNOEXEC (in field 9 of /proc/PID/stat) before
 * it closes descriptors in execve, and never in exit.
 */
static bool has_execed(pid_t pid)
{
	enum { PF_FORKNOEXEC = 0x40 };
	char data[512];
	struct text path = {data, 0, sizeof data - 1};

	text_add(&path, "/proc/");
	text_number(&path, pid);
	text_add(&path, "/stat");
	data[path.size] = 0;
	int fd = open(data, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return true;
	read_file(fd, data, sizeof data);
	close(fd);

	const char *field = strrchr(data, ')'); /* field 2 is the name, which may hold anything, also ")" */
	for (int number = 2; field && number < 9; number++)
		field = strchr(field + 1, ' ');
	return !field || !(strtoul(field, NULL, 10) & PF_FORKNOEXEC);
}

/* Reaps all that can be reaped.  True when the init has ended. */
bool init_reap(void)
{
	siginfo_t info = {0};
	int status;

	if (!init.pid) { /* an init that we do not know yet may be among those that have ended, and must be found */
		if (init.donor && waitpid(init.donor, &init.status, WNOHANG) > 0)
			init.donor = 0;
		return false;
	}
	/* Looked at before it is reaped, because that takes its /proc/PID/stat away. */
	while (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid) {
		bool is_init = info.si_pid == init.pid && !init.ended; /* later, an orphan of ours may get its pid */
		bool execed = is_init && has_execed(init.pid);
		if (info.si_pid == init.donor)
			init.donor = 0;
		if (waitpid(info.si_pid, &status, 0) == init.pid && is_init) {
			init.ended = true;
			init.execed = execed;
			init.status = status;
			init.finished_at = realtime_ns();
		}
		info.si_pid = 0;
	}
	return init.ended;
}

bool init_ended(void)
{
	return init.ended;
}

/* Whether its command runs, or ran. */
bool init_has_execed(void)
{
	return init.ended ? init.execed : has_execed(init.pid);
}

/* 0, or an errno: ESRCH when it has ended.  The pid is surely ours until init_reap has seen its end. */
int init_kill(int signal)
{
	if (!init.pid || init_reap())
		return ESRCH;
	return kill(init.pid, signal) < 0 ? errno : 0;
}

static bool ends_within(int ms)
{
	long long end = monotonic_ms() + ms, left;
	sigset_t child;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	while (!init_reap()) {
		left = end - monotonic_ms();
		if (left <= 0)
			return false;
		sigtimedwait(&child, NULL, &(struct timespec){left / 1000, left % 1000 * 1000000});
	}
	return true;
}

/*
 * Leaves no init: lets it end by itself for some milliseconds, so that its own wait status is seen, then kills it.
 * True when it ended by itself.  One that does not end when killed (it hangs in the kernel) is given up after 5 s.
 */
bool init_destroy(int patience_ms)
{
	init_end_donor();
	if (!init.pid || ends_within(patience_ms))
		return true;
	kill(init.pid, SIGKILL);
	if (!ends_within(5000))
		report("the init does not end, though killed", 0);
	return false;
}

static int oom_fd = -1;
static long oom_kills_before;

/* The value of the line "oom_kill N", in a cgroup v2 memory.events as in a v1 memory.oom_control; 0 when unknown. */
static long oom_kills(void)
{
	char data[512];

	if (oom_fd < 0 || read_file(oom_fd, data, sizeof data) <= 0)
		return 0;
	for (const char *line = data; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (strncmp(line, "oom_kill ", 9) == 0)
			return strtol(line + 9, NULL, 10);
	}
	return 0;
}

/* Opened at the start and kept: it then stays readable wherever the cgroup is moved.  Without it no OOM is seen. */
void init_watch_oom(const char *path)
{
	oom_fd = open(path, O_RDONLY | O_CLOEXEC);
	oom_kills_before = oom_kills();
}

void init_wait_status(struct text *t)
{
	if (WIFSIGNALED(init.status)) {
		text_add(t, "killed by signal ");
		text_number(t, WTERMSIG(init.status));
		if (WTERMSIG(init.status) == SIGSYS)
			text_add(t, " (SIGSYS: its seccomp profile kills for a call that every start makes)");
	} else {
		text_add(t, "exited with code ");
		text_number(t, WEXITSTATUS(init.status));
	}
}

/* The exit object.  A command that could not be executed ends with 128, as the kubelet's StartError does. */
void init_exit(struct text *t, bool start_failed)
{
	int signal = WIFSIGNALED(init.status) && !start_failed ? WTERMSIG(init.status) : 0;
	int code = start_failed ? 128 : signal ? 128 + signal : WEXITSTATUS(init.status);

	text_add(t, "{\"code\":");
	text_number(t, code);
	text_add(t, ",\"signal\":");
	text_number(t, signal);
	text_add(t, ",\"oom_killed\":");
	text_add(t, oom_kills() > oom_kills_before ? "true" : "false");
	text_add(t, ",\"finished_at\":");
	text_number(t, init.finished_at);
	text_add(t, "}");
}
