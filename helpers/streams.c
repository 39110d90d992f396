/*
 * The container's output and input: two pipes and a third for stdin, or one terminal for all.
 *
 * Output goes from here to the log and to the attached clients; input comes from them.  Not here: who they are.
 */
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
	DRAIN_CHUNKS = 128,      /* a pipe holds at most 1 MiB, so this many reads empty it */
	HUNG_UP_RETRY_MS = 100,
};

static struct stream {
	int fd;
	char number;
	const char *name;
} output[2] = {{-1, STREAM_STDOUT, "stdout"}, {-1, STREAM_STDERR, "stderr"}};

static int terminal = -1;
static long long hung_up_until; /* when to look again at a terminal that no process has open */

/* The packet of the last read: its stream's number, then the data.  Clients that are behind still want it. */
static char packet[1 + CHUNK];

/* Input that the container has not taken yet.  The next packet is only received when all of it is taken. */
static struct {
	int fd;
	bool closing;
	size_t at, size;
} input = {.fd = -1};
static char input_data[CHUNK];

static int set_nonblocking(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? errno : 0;
}

/* Takes the pipes that the monitor was started with into use.  0 or an errno. */
int streams_open(bool has_stdin)
{
	int failed;

	if ((failed = set_nonblocking(STDOUT_FD)) || (failed = set_nonblocking(STDERR_FD)))
		return failed;
	if (has_stdin && (failed = set_nonblocking(STDIN_FD)))
		return failed;
	output[0].fd = STDOUT_FD;
	output[1].fd = STDERR_FD;
	input.fd = has_stdin ? STDIN_FD : -1;
	return 0;
}

/* Takes a terminal's master side into use.  Its settings are the container's own affair.  0 or an errno. */
int streams_terminal(int master)
{
	if (terminal >= 0)
		return EBUSY;
	if (!isatty(master))
		return ENOTTY;
	terminal = output[0].fd = input.fd = master;
	return set_nonblocking(master);
}

bool streams_have_terminal(void)
{
	return terminal >= 0;
}

/* 0 or an errno: ENOTTY without a terminal. */
int streams_resize(unsigned short height, unsigned short width)
{
	struct winsize size = {.ws_row = height, .ws_col = width};

	if (terminal < 0)
		return ENOTTY;
	return ioctl(terminal, TIOCSWINSZ, &size) < 0 ? errno : 0;
}

/* Reads once, logs and passes on.  False when there is nothing to read. */
static bool pump(struct stream *s)
{
	ssize_t size = s->fd < 0 ? -1 : read(s->fd, packet + 1, CHUNK);

	if (size > 0) {
		packet[0] = s->number;
		log_write(s->name, packet + 1, (size_t)size);
		journal_write(s->name, packet + 1, (size_t)size);
		control_output(packet, (size_t)size + 1);
		return true;
	}
	if (s->fd < 0 || (size < 0 && (errno == EAGAIN || errno == EINTR)))
		return false;
	if (s->fd != terminal) {
		close(s->fd);
		s->fd = -1;
	} else if (init_ended()) {
		s->fd = -1;
	} else {
		/* EIO: no process has the terminal open, but one may open it again, as systemd does with its console. */
		hung_up_until = monotonic_ms() + HUNG_UP_RETRY_MS;
	}
	return false;
}

bool streams_finished(void)
{
	return output[0].fd < 0 && output[1].fd < 0;
}

/* Takes what is still in the pipes, for the last time. */
void streams_drain(void)
{
	for (int i = 0; i < 2; i++)
		for (int chunks = 0; chunks < DRAIN_CHUNKS && pump(&output[i]); chunks++)
			control_drop_laggards();
}

/* Where to put the next CHUNK bytes of input; NULL while the container has not taken the last ones. */
char *input_buffer(void)
{
	return input.size ? NULL : input_data;
}

static void input_end(void)
{
	if (input.fd != terminal)
		close(input.fd);
	input.fd = -1;
	input.size = 0;
}

static void input_flush(void)
{
	while (input.size) {
		ssize_t written = write(input.fd, input_data + input.at, input.size);
		if (written < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (written < 0) { /* EPIPE: the container closed its stdin */
			input_end();
			return;
		}
		input.at += (size_t)written;
		input.size -= (size_t)written;
	}
	if (input.closing && input.fd >= 0)
		input_end();
}

/* Sends what was put in input_buffer.  It is dropped when stdin is closed. */
void input_send(size_t size)
{
	if (input.fd < 0 || input.closing)
		return;
	input.at = 0;
	input.size = size;
	input_flush();
}

/* Closes the container's stdin after what it was sent.  0 or an errno: a terminal's input has no end. */
int input_close(void)
{
	if (terminal >= 0)
		return ENOTTY;
	input.closing = true;
	input_flush();
	return 0;
}

static struct pollfd wanted(int fd, short events)
{
	return (struct pollfd){.fd = events ? fd : -1, .events = events};
}

/* Output is not read while some client is behind, so the container waits for it (and control.c bounds the wait). */
void streams_poll(struct pollfd *p, long long now, long long *deadline)
{
	short reading = control_holds_output() ? 0 : POLLIN;
	bool hung_up = hung_up_until > now && !init_ended();

	p[0] = wanted(output[0].fd, hung_up ? 0 : reading);
	p[1] = wanted(output[1].fd, reading);
	p[2] = wanted(input.fd, input.size ? POLLOUT : 0);
	if (hung_up && hung_up_until < *deadline)
		*deadline = hung_up_until;
}

void streams_serve(const struct pollfd *p)
{
	for (int i = 0; i < 2; i++)
		if (p[i].revents && !control_holds_output())
			pump(&output[i]);
	if (p[2].revents)
		input_flush();
}
