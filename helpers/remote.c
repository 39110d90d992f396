/*
 * `crio-monitor remote`: the monitor of a container whose first process is not ours, but a shim's.
 *
 * The shim writes output to named pipes and takes input from one; this is their other end.  It logs, serves the
 * control socket and whoever attaches while the daemon comes and goes.  It sees no process: the daemon, which asks the
 * shim, tells it by the request `ended` how the container ended, or by `lost` that nobody will ever know.
 *
 * It is an ordinary program: its descriptor 1 is the reply socket, and it goes to the background by itself.
 */
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DRAIN_MS = 500 }; /* for output that is still on its way through the shim */

static struct {
	const char *id, *run_dir, *log, *journal;
	long long log_size_max;
	bool has_stdin, stdin_once;
} options;

static bool remote, ended, lost;
static long long told[3]; /* code, whether the kernel ran out of memory, nanoseconds since the epoch */

static _Noreturn void fail(int number, const char *path, const char *detail)
{
	char data[FAILURE_ROOM];
	struct text t = {data, 0, sizeof data};

	text_add(&t, "{\"error\":");
	text_failure(&t, &(struct failure){"monitor", number, path, detail});
	text_add(&t, "}");
	control_remove();
	if (send(REPLY_FD, t.data, t.size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		report(detail, number);
	_exit(1);
}

static void read_arguments(char **at)
{
	for (; *at; at++) {
		if (strcmp(*at, "--stdin") == 0)
			options.has_stdin = true;
		else if (strcmp(*at, "--stdin-once") == 0)
			options.stdin_once = true;
		else if (strcmp(*at, "--id") == 0 && at[1])
			options.id = *++at;
		else if (strcmp(*at, "--run-dir") == 0 && at[1])
			options.run_dir = *++at;
		else if (strcmp(*at, "--log") == 0 && at[1])
			options.log = *++at;
		else if (strcmp(*at, "--journal") == 0 && at[1])
			options.journal = *++at;
		else if (strcmp(*at, "--log-size-max") == 0 && at[1])
			options.log_size_max = strtoll(*++at, NULL, 10);
		else
			fail(EINVAL, *at, "unknown argument, or one without its value");
	}
	if (!options.id || !options.run_dir || (options.log && *options.log != '/'))
		fail(EINVAL, "", "--id and --run-dir must be given, and --log must be an absolute path");
}

/* Independent of the launcher, and of signals that are meant for the daemon; see settle() of main.c. */
static void settle(void)
{
	static const int ignored[] = {SIGPIPE, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ, SIGUSR1, SIGUSR2};

	for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
		signal(ignored[i], SIG_IGN);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	setsid();
	umask(0);
	syscall(SYS_close_range, REPLY_FD + 1, ~0U, 0);
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!write(fd, "-1000", 5);
		close(fd);
	}
	fd = open("/proc/self/fd/2", O_WRONLY | O_APPEND | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (fd >= 0) {
		dup2(fd, 2);
		close(fd);
	}
	if (chdir(options.run_dir) < 0)
		fail(errno, options.run_dir, "cannot enter the container's run_dir");
}

static bool open_as(int number, const char *path, int flags)
{
	int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);

	if (fd < 0)
		return false;
	if (fd != number) {
		dup3(fd, number, O_CLOEXEC);
		close(fd);
	}
	return true;
}

/*
 * Our ends of the pipes.  Stdin is opened for reading too: a write end alone is refused before the shim has the other.
 * A terminal has no stderr.
 */
static void open_pipes(void)
{
	for (int number = STDIN_FD; number <= STDERR_FD; number++)
		open_as(number, "/dev/null", O_RDWR); /* no pipe may get the number of another */
	if (options.has_stdin && !open_as(STDIN_FD, "stdin", O_RDWR))
		fail(errno, "stdin", "cannot open the pipe in run_dir");
	if (!open_as(STDOUT_FD, "stdout", O_RDONLY))
		fail(errno, "stdout", "cannot open the pipe in run_dir");
	if (!open_as(STDERR_FD, "stderr", O_RDONLY) && errno != ENOENT)
		fail(errno, "stderr", "cannot open the pipe in run_dir");
}

static void begin(void)
{
	char data[96];
	struct text t = {data, 0, sizeof data};
	int failed;

	if (options.log && (failed = log_open(options.log, options.log_size_max)))
		fail(failed, options.log, "cannot open the log as a regular file");
	if (options.journal && (failed = journal_open(options.id, options.journal)))
		fail(failed, options.journal, "cannot name the container's messages in the journal");
	open_pipes();
	if ((failed = streams_open(options.has_stdin)))
		fail(failed, "", "the pipes in run_dir cannot be used");
	if ((failed = control_listen(options.stdin_once)))
		fail(failed, "control", "cannot serve the control socket in run_dir");
	text_add(&t, "{\"created\":{\"pid\":0,\"monitor\":");
	text_number(&t, getpid());
	text_add(&t, ",\"init\":{}}}");
	if (send(REPLY_FD, t.data, t.size, MSG_NOSIGNAL) < 0)
		fail(errno, "", "the daemon went away while the container was created");
	close(REPLY_FD);
}

/* "CODE OOM NANOSECONDS".  0 or an errno: EPERM when the container is the monitor's own child. */
int remote_ended(const char *text)
{
	static const long long most[] = {255, 1, LLONG_MAX};
	long long read[3];
	char *end;

	if (!remote)
		return EPERM;
	for (int i = 0; i < 3; i++, text = end + 1) {
		errno = 0;
		read[i] = strtoll(text, &end, 10);
		if (errno || end == text || *end != (i < 2 ? ' ' : 0) || read[i] < 0 || read[i] > most[i])
			return EINVAL;
	}
	if (!ended)
		memcpy(told, read, sizeof told);
	ended = true;
	return 0;
}

/* 0 or an errno: EPERM when the container is the monitor's own child. */
int remote_lost(void)
{
	if (!remote)
		return EPERM;
	lost = !ended || lost;
	ended = true;
	return 0;
}

static bool write_file(const char *name, const char *data, size_t size)
{
	int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	bool written = fd >= 0 && write(fd, data, size) == (ssize_t)size;

	if (fd >= 0)
		close(fd);
	return written;
}

/* As the other monitors leave; but of a container that was lost there is nothing to tell, and no exit file. */
static _Noreturn void finish(void)
{
	char data[160];
	struct text t = {data, 0, sizeof data};

	control_drop_laggards();
	streams_drain();
	log_close();
	if (!lost) {
		text_add(&t, "{\"code\":");
		text_number(&t, told[0]);
		text_add(&t, ",\"signal\":0,\"oom_killed\":");
		text_add(&t, told[1] ? "true" : "false");
		text_add(&t, ",\"finished_at\":");
		text_number(&t, told[2] ? told[2] : realtime_ns());
		text_add(&t, "}");
		if (!write_file("exit.tmp", t.data, t.size) || rename("exit.tmp", "exit") < 0)
			report("cannot write the exit file", errno);
	}
	control_remove();
	control_ended(t.data, t.size);
	_exit(0);
}

enum { P_STREAMS, P_CONTROL = P_STREAMS + STREAM_SLOTS, P_COUNT = P_CONTROL + CONTROL_SLOTS };

int remote_main(char **arguments)
{
	struct pollfd p[P_COUNT];
	long long now = monotonic_ms(), never = now + (1LL << 40), drain_end = never;

	struct stat is;

	if (fstat(1, &is) < 0 || !S_ISSOCK(is.st_mode)) {
		report("this program is started by crio-native, with a socket as descriptor 1", 0);
		return 2;
	}
	dup2(1, REPLY_FD);
	dup2(0, 1); /* /dev/null */
	dup2(0, 3);
	remote = true;
	read_arguments(arguments);
	report_as(options.id);
	if (fork() != 0)
		return 0;
	settle();
	begin();
	for (;;) {
		if (ended && drain_end == never)
			drain_end = now + DRAIN_MS;
		if (ended && (now >= drain_end || (streams_finished() && !control_holds_output())))
			finish();
		long long deadline = drain_end;
		streams_poll(p + P_STREAMS, now, &deadline);
		control_poll(p + P_CONTROL, &deadline);
		if (poll(p, P_COUNT, deadline == never ? -1 : (int)(deadline > now ? deadline - now : 0)) < 0)
			continue;
		now = monotonic_ms();
		streams_serve(p + P_STREAMS);
		control_serve(p + P_CONTROL, now);
	}
}
