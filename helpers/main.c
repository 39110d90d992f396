/*
 * crio-monitor: the program's arguments, its dialogue with the container's init, and its loop.
 *
 * The container's way: WAITING for the init's R or E; CREATED, after the daemon was told; STARTING, after the init was
 * told; RUNNING, when its execve has succeeded or failed.  From any of them it ends when the init does.
 *
 * A monitor that is started with --donor alone waits for its container first: its arguments come in a packet, its init
 * is born later, of the donor.
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
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
	INIT_PATIENCE_MS = 1000, /* for an init that went silent to end by itself */
	DRAIN_MS = 500,          /* for processes that outlive the init to close its output */
};

static struct {
	const char *id, *log, *oom_file, *journal;
	pid_t pid;
	long long log_size_max;
	bool tty, has_stdin, stdin_once;
} options;

static enum { WAITING, CREATED, STARTING, RUNNING } state;
static bool sync_open = true, start_failed;
static int child_signals;

/* Ends the whole attempt: no init, no socket, and the daemon knows why.  `error` is a JSON object. */
static _Noreturn void give_up(const char *error, size_t size)
{
	struct iovec parts[] = {{"{\"error\":", 9}, {(char *)error, size}, {"}", 1}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};

	init_destroy(0);
	control_remove();
	if (sendmsg(REPLY_FD, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		report("the container was not created, and the daemon is not there to be told", 0);
	_exit(1);
}

static _Noreturn void fail(const char *step, int number, const char *path, const char *detail)
{
	char data[FAILURE_ROOM];
	struct text t = {data, 0, sizeof data};

	text_failure(&t, &(struct failure){step, number, path, detail});
	give_up(t.data, t.size);
}

/* "WHAT: killed by signal 9", with the terminating zero. */
static void describe_end(char *line, size_t room, const char *what)
{
	struct text t = {line, 0, room - 1};

	text_add(&t, what);
	text_add(&t, ": ");
	init_wait_status(&t);
	line[t.size] = 0;
}

static _Noreturn void fail_silent_init(void)
{
	char line[160];

	if (!init_destroy(INIT_PATIENCE_MS))
		fail("init", 0, "", "the init closed its sync socket before it was ready, and went on");
	describe_end(line, sizeof line, "the init ended before it was ready");
	fail("init", 0, "", line);
}

/* True if the argument is `name`; then *at moves on to its value. */
static bool option(char ***at, const char *name, const char **value)
{
	if (strcmp(**at, name) != 0)
		return false;
	if (!*++*at)
		fail("monitor", EINVAL, name, "this argument needs a value");
	*value = **at;
	return true;
}

static long long number_of(const char *name, const char *text, long long most)
{
	char *end;

	errno = 0;
	long long n = strtoll(text, &end, 10);
	if (errno || end == text || *end || n < 1 || n > most)
		fail("monitor", EINVAL, name, "this argument's value is not a number, or out of range");
	return n;
}

static void read_arguments(char **at)
{
	const char *number;

	for (; *at; at++) {
		if (strcmp(*at, "--tty") == 0)
			options.tty = true;
		else if (strcmp(*at, "--stdin") == 0)
			options.has_stdin = true;
		else if (strcmp(*at, "--stdin-once") == 0)
			options.stdin_once = true;
		else if (strcmp(*at, "--sync-log") == 0)
			log_sync();
		else if (option(&at, "--pid", &number))
			options.pid = (pid_t)number_of("--pid", number, INT_MAX);
		else if (option(&at, "--log-size-max", &number))
			options.log_size_max = number_of("--log-size-max", number, LLONG_MAX);
		else if (!option(&at, "--id", &options.id) && !option(&at, "--log", &options.log) &&
			 !option(&at, "--oom-file", &options.oom_file) && !option(&at, "--journal", &options.journal))
			fail("monitor", EINVAL, *at, "unknown argument");
	}
	if (!options.id)
		fail("monitor", EINVAL, "", "--id must be given");
	if (options.log && *options.log != '/')
		fail("monitor", EINVAL, options.log, "--log must be an absolute path");
}

/*
 * Makes the process independent of the launcher that it was born from, and of whatever that had set.  Refusals of what
 * is only better to have are not looked at.
 */
static void settle(void)
{
	static const int ignored[] = {SIGPIPE, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ, SIGUSR1, SIGUSR2};
	sigset_t child;
	int fd;

	for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
		signal(ignored[i], SIG_IGN);
	signal(SIGCHLD, SIG_DFL); /* an inherited SIG_IGN would reap the init for us, and never tell how it ended */
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_SETMASK, &child, NULL);

	prctl(PR_SET_PDEATHSIG, 0);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	setsid();
	umask(0);
	syscall(SYS_close_range, STDERR_FD + 1, ~0U, 0);
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!write(fd, "-1000", 5);
		close(fd);
	}
	/* Messages must not wait for a reader: an open of our own can be non-blocking; a socket cannot be opened, but
	 * is written to with MSG_DONTWAIT. */
	fd = open("/proc/self/fd/2", O_WRONLY | O_APPEND | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (fd >= 0) {
		dup2(fd, 2);
		close(fd);
	}

	child_signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* Takes the container on: its arguments, and run_dir as the working directory. */
static void take_on(char **arguments)
{
	read_arguments(arguments);
	report_as(options.id);
	if (child_signals < 0)
		fail("monitor", EMFILE, "", "signalfd");
	if (fchdir(RUN_DIR_FD) < 0)
		fail("monitor", errno, "", "descriptor 5 is not the container's run_dir");
	close(RUN_DIR_FD);
}

/* Splits words that each end with a zero.  NULL when there are too many, or the last one has no end. */
static char **split(char *words, size_t size)
{
	enum { WORDS_MAX = 32 };
	static char *list[WORDS_MAX + 1];
	char *end = words + size;

	if (!size || end[-1])
		return NULL;
	for (size_t n = 0; n < WORDS_MAX; n++) {
		list[n] = words;
		words += strlen(words) + 1;
		if (words == end)
			return list;
	}
	return NULL;
}

/*
 * Waits until there is a container: the packet `A` and its arguments, with reply and run_dir as descriptors.  No packet
 * means that the donor has ended, as it does when the daemon has.
 */
static void await_container(void)
{
	static char packet[PACKET_MAX];
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(2 * sizeof(int))];
	} control;
	struct iovec part = {packet, sizeof packet};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control
	};
	int fds[2];

	prctl(PR_SET_NAME, "crio-spare");
	ssize_t size = recvmsg(SYNC_FD, &message, MSG_CMSG_CLOEXEC);
	prctl(PR_SET_NAME, "crio-monitor");
	struct cmsghdr *c = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (!c || c->cmsg_len != CMSG_LEN(sizeof fds))
		_exit(0);
	memcpy(fds, CMSG_DATA(c), sizeof fds); /* both above 8: the streams' descriptors are in use up to there */
	dup3(fds[0], REPLY_FD, O_CLOEXEC);
	dup3(fds[1], RUN_DIR_FD, O_CLOEXEC);
	close(fds[0]);
	close(fds[1]);

	char **words = *packet == 'A' ? split(packet + 1, (size_t)size - 1) : NULL;
	if (!words)
		fail("monitor", EPROTO, "", "the arguments are unknown, too many or too long");
	take_on(words);
	if (!options.has_stdin || options.tty)
		close(STDIN_FD);
	if (options.tty) {
		close(STDOUT_FD);
		close(STDERR_FD);
	}
}

/* The init is ready: takes log, socket and streams into use, then tells the daemon. */
static void become_created(const char *object, size_t size)
{
	char data[96];
	struct text head = {data, 0, sizeof data};
	int failed;

	if (options.oom_file)
		init_watch_oom(options.oom_file); /* not before: the group may have been in the making */
	if (options.tty && !streams_have_terminal())
		fail("monitor", EPROTO, "", "the init is ready but sent no terminal");
	if (options.log && (failed = log_open(options.log, options.log_size_max)))
		fail("monitor", failed, options.log, "cannot open the log as a regular file");
	if (options.journal && (failed = journal_open(options.id, options.journal)))
		fail("monitor", failed, options.journal, "cannot name the container's messages in the journal");
	if (!options.tty && (failed = streams_open(options.has_stdin)))
		fail("monitor", failed, "", "descriptors 6 to 8 are not the container's streams");
	if ((failed = control_listen(options.stdin_once)))
		fail("monitor", failed, "control", "cannot serve the control socket in run_dir");

	text_add(&head, "{\"created\":{\"pid\":");
	text_number(&head, init_pid());
	text_add(&head, ",\"monitor\":");
	text_number(&head, getpid());
	text_add(&head, ",\"init\":");
	struct iovec parts[] = {{head.data, head.size}, {size ? (char *)object : "{}", size ? size : 2}, {"}}", 2}};
	if (sendmsg(REPLY_FD, &(struct msghdr){.msg_iov = parts, .msg_iovlen = 3}, MSG_NOSIGNAL) < 0)
		fail("monitor", errno, "", "the daemon went away while the container was created");
	control_take(REPLY_FD);
	state = CREATED;
}

/* Lets the init go on to its execve.  0 or an errno: EALREADY, or EPIPE when it has ended. */
int container_start(void)
{
	if (state != CREATED)
		return EALREADY;
	if (send(SYNC_FD, "S", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return errno;
	state = STARTING;
	return 0;
}

static void end_start(const char *error, size_t size)
{
	start_failed = size > 0;
	state = RUNNING;
	control_started(error, size);
}

static void close_sync(void)
{
	close(SYNC_FD);
	sync_open = false;
}

/* Receives a packet of the init and at most one descriptor (else -1).  The size, 0 at the end, -1 if there is none. */
static ssize_t receive_sync(char *packet, int *fd)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = {packet, PACKET_MAX};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control
	};

	*fd = -1;
	ssize_t size = recvmsg(SYNC_FD, &message, MSG_DONTWAIT | MSG_TRUNC | MSG_CMSG_CLOEXEC);
	if (size < 0)
		return errno == EAGAIN ? -1 : 0;
	struct cmsghdr *c = CMSG_FIRSTHDR(&message);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(c), sizeof *fd);
	return size;
}

/* One packet of a waiting init, or of its donor. */
static void serve_waiting(const char *packet, size_t size, int fd)
{
	int failed;

	if (*packet == 'B' && size > 1 && size < 16) {
		if (!init_born((pid_t)strtol(packet + 1, NULL, 10)))
			fail("monitor", ECHILD, "", "the process that was born is no child of the donor");
	} else if (*packet == 'R' && size <= PACKET_MAX && init_pid()) {
		become_created(packet + 1, size - 1);
	} else if (*packet == 'E' && size > 1 && size <= PACKET_MAX) {
		give_up(packet + 1, size - 1);
	} else if (*packet == 'C' && size == 1 && fd >= 0 && options.tty) {
		if ((failed = streams_terminal(fd)))
			fail("monitor", failed, "", "what the init sent is not one terminal");
	} else {
		fail("monitor", EPROTO, "", "the init sent a packet that is unknown or too large");
	}
}

/* One packet of the init, or its closing of the socket.  False when there is none. */
static bool serve_sync(void)
{
	static char packet[PACKET_MAX];
	int fd;
	ssize_t size = receive_sync(packet, &fd);

	if (size < 0)
		return false;
	if (state == WAITING && size > 0) {
		serve_waiting(packet, (size_t)size, fd);
	} else if (state == WAITING) {
		fail_silent_init();
	} else if (size > 1 && size <= PACKET_MAX && *packet == 'E') {
		close_sync();
		end_start(packet + 1, (size_t)size - 1);
		init_kill(SIGKILL);
	} else if (init_has_execed()) {
		close_sync();
		end_start("", 0);
	} else {
		close_sync();
		init_kill(SIGKILL); /* it is ending; serve_end will see how, and answers `start` */
	}
	return true;
}

static bool awaits_init(void)
{
	return sync_open && (state == WAITING || state == STARTING);
}

/* The init has ended.  What it said before that may still be in the socket. */
static void serve_end(void)
{
	char line[160], data[FAILURE_ROOM];
	struct text t = {data, 0, sizeof data};

	while (awaits_init() && serve_sync())
		;
	if (state == WAITING)
		fail_silent_init();
	if (state == STARTING) {
		describe_end(line, sizeof line, "the init ended before it executed the command");
		text_failure(&t, &(struct failure){"init", 0, "", line});
		end_start(t.data, t.size);
	}
}

static bool write_file(const char *name, const char *data, size_t size)
{
	int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	bool written = fd >= 0 && write(fd, data, size) == (ssize_t)size;

	if (fd >= 0)
		close(fd);
	return written;
}

/* Logs the last output and leaves the exit file, then removes the socket: whoever finds no socket finds the file. */
static _Noreturn void finish(void)
{
	char data[160];
	struct text t = {data, 0, sizeof data};

	control_drop_laggards();
	streams_drain();
	init_exit(&t, start_failed);
	if (!write_file("exit.tmp", t.data, t.size) || rename("exit.tmp", "exit") < 0)
		report("cannot write the exit file", errno);
	control_remove();
	control_ended(t.data, t.size);
	log_close(); /* late: nobody waits for the disk */
	init_end_donor(); /* it may be taking memory down yet, and would be somebody else's to reap */
	_exit(0);
}

enum { P_CHILD, P_SYNC, P_REPLY, P_STREAMS, P_CONTROL = P_STREAMS + STREAM_SLOTS, P_COUNT = P_CONTROL + CONTROL_SLOTS };

/*
 * What to wait for is worked out anew from the state at each turn, so that holding something back is a condition in
 * one place and there is nothing to undo.
 */
static _Noreturn void loop(void)
{
	struct pollfd p[P_COUNT];
	long long now = monotonic_ms(), never = now + (1LL << 40), drain_end = never, deadline;
	bool ended = false;

	init_reap(); /* an init that ended before settle() blocked SIGCHLD sends no other */
	for (;;) {
		if (ended && (now >= drain_end || (streams_finished() && !control_holds_output())))
			finish();

		deadline = drain_end;
		p[P_CHILD] = (struct pollfd){.fd = child_signals, .events = POLLIN};
		p[P_SYNC] = (struct pollfd){.fd = awaits_init() ? SYNC_FD : -1, .events = POLLIN};
		p[P_REPLY] = (struct pollfd){.fd = state == WAITING ? REPLY_FD : -1, .events = POLLIN};
		streams_poll(p + P_STREAMS, now, &deadline);
		control_poll(p + P_CONTROL, &deadline);
		if (poll(p, P_COUNT, deadline == never ? -1 : (int)(deadline > now ? deadline - now : 0)) < 0)
			continue;
		now = monotonic_ms();

		if (p[P_REPLY].revents)
			fail("monitor", ECANCELED, "", "the daemon went away while the container was created");
		if (p[P_SYNC].revents)
			serve_sync();
		if (p[P_CHILD].revents) {
			struct signalfd_siginfo info;
			while (read(child_signals, &info, sizeof info) > 0)
				;
			init_reap();
		}
		if (!ended && init_ended()) {
			ended = true;
			drain_end = now + DRAIN_MS;
			serve_end();
		}
		streams_serve(p + P_STREAMS);
		control_serve(p + P_CONTROL, now);
	}
}

static int refuse(void)
{
	report("this program is started by crio-native, with its sockets as descriptors 3 and 4", 0);
	return 2;
}

int main(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "pause") == 0)
		return pause_main();
	if (argc > 1 && strcmp(argv[1], "remote") == 0)
		return remote_main(argv + 2);
	bool waits = argc == 3 && strcmp(argv[1], "--donor") == 0;
	if (fcntl(SYNC_FD, F_GETFD) < 0 || (!waits && fcntl(REPLY_FD, F_GETFD) < 0))
		return refuse();
	settle();
	if (waits) {
		init_expect((pid_t)strtol(argv[2], NULL, 10));
		await_container();
	} else {
		take_on(argv + 1);
		if (!init_adopt(options.pid))
			fail("monitor", ECHILD, "", "--pid must name a child of the monitor");
	}
	loop();
}
