/*
 * The control socket: clients, their requests, and those that are attached to the container's streams.
 *
 * A client that takes its output slowly holds the container back, as a slow terminal would, so that it loses nothing;
 * but only for so long: one that takes no packet for PATIENCE_MS is dropped, and log and other clients go on.
 */
#include "monitor.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	ATTACHED_MAX = 32,    /* the other clients' places are for those who want to stop the container */
	REQUEST_MAX = 64,
	PATIENCE_MS = 5000,
	UNREAD_MAX = 64,
};

static struct client {
	int fd;         /* 0: a free place */
	bool watching;
	bool starting;  /* waits for the answer to `start` */
	bool attached;
	bool input;     /* what it sends is the container's stdin */
	bool behind;    /* could not take the last packet of output yet */
} clients[CLIENTS_MAX];

static int listener = -1;
static bool bound;
static bool once; /* the first client that ends its input closes stdin */

static const char *last_packet;
static size_t last_size;
static long long held_since;

/*
 * Serves `control` in the current directory, the container's run_dir: a relative name, as sun_path is too short for a
 * whole path.  0 or an errno.
 */
int control_listen(bool stdin_once)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "control"};

	once = stdin_once;
	listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (listener < 0)
		return errno;
	mode_t before = umask(0177);
	bound = bind(listener, (struct sockaddr *)&address, sizeof address) == 0;
	umask(before);
	return bound && listen(listener, CLIENTS_MAX) == 0 ? 0 : errno;
}

/* The socket on which the daemon was told of the container goes on as the first client, who watches. */
void control_take(int fd)
{
	clients[0] = (struct client){.fd = fd, .watching = true};
}

void control_remove(void)
{
	if (bound) /* else it is someone else's */
		unlink("control");
}

/*
 * Ends a client.  First its unread packets are taken off: closing a socket that has some makes the peer's next read
 * fail with ECONNRESET, before the packets that are on their way to it.
 */
static void drop(struct client *c)
{
	char byte;

	if (c->input && once)
		input_close();
	shutdown(c->fd, SHUT_RDWR);
	for (int i = 0; i < UNREAD_MAX && recv(c->fd, &byte, 1, MSG_DONTWAIT | MSG_TRUNC) > 0; i++)
		;
	close(c->fd);
	*c = (struct client){0};
}

/* Answers "VERB" or "VERB BODY".  A client whose socket is full does not read its answers, and is dropped. */
static void answer(struct client *c, const char *verb, const char *body, size_t size)
{
	struct iovec parts[] = {{(char *)verb, strlen(verb)}, {" ", size ? 1 : 0}, {(char *)body, size}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};

	if (sendmsg(c->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		drop(c);
}

static void refuse(struct client *c, const char *step, int number, const char *detail)
{
	char data[FAILURE_ROOM];
	struct text t = {data, 0, sizeof data};

	text_failure(&t, &(struct failure){step, number, "", detail});
	answer(c, "error", t.data, t.size);
}

static void conclude(struct client *c, const char *step, int number, const char *detail)
{
	if (number)
		refuse(c, step, number, detail);
	else
		answer(c, "ok", "", 0);
}

static void attach(struct client *c, bool with_input)
{
	int attached = 0;

	for (struct client *other = clients; other < clients + CLIENTS_MAX; other++)
		attached += other->attached;
	if (attached == ATTACHED_MAX) {
		refuse(c, "attach", EBUSY, "32 clients are attached, no more can be");
		return;
	}
	c->attached = true;
	c->input = with_input;
	answer(c, "ok", "", 0);
}

/* Whether a request is `name` followed by exactly `count` decimal numbers of 0..65535, which go to values. */
static bool is(const char *request, const char *name, int count, long *values)
{
	size_t length = strlen(name);

	if (strncmp(request, name, length) != 0)
		return false;
	request += length;
	for (int i = 0; i < count; i++) {
		if (*request++ != ' ' || *request < '0' || *request > '9')
			return false;
		for (values[i] = 0; *request >= '0' && *request <= '9' && values[i] <= 65535; request++)
			values[i] = values[i] * 10 + (*request - '0');
		if (values[i] > 65535)
			return false;
	}
	return !*request;
}

static void obey(struct client *c, const char *request)
{
	long n[2];

	if (is(request, "start", 0, n)) {
		int failed = container_start();
		if (failed)
			refuse(c, "start", failed, failed == EALREADY ? "it was started before" : "the init has ended");
		else
			c->starting = true;
	} else if (is(request, "watch", 0, n)) {
		c->watching = true; /* if the container has just ended, control_ended will tell */
	} else if (is(request, "kill", 1, n)) {
		conclude(c, "kill", n[0] ? init_kill((int)n[0]) : EINVAL, "");
	} else if (strncmp(request, "ended ", 6) == 0) {
		conclude(c, "ended", remote_ended(request + 6), "");
	} else if (is(request, "lost", 0, n)) {
		conclude(c, "lost", remote_lost(), "");
	} else if (is(request, "reopen", 0, n)) {
		conclude(c, "reopen", log_reopen(), "the log goes on in the file that was open");
	} else if (is(request, "resize", 2, n)) {
		conclude(c, "resize", streams_resize((unsigned short)n[0], (unsigned short)n[1]), "");
	} else if (is(request, "close-stdin", 0, n)) {
		conclude(c, "close-stdin", input_close(), "a terminal's input has no end; send its end-of-file character");
	} else if (is(request, "attach", 0, n)) {
		attach(c, true);
	} else if (is(request, "attach output", 0, n)) {
		attach(c, false);
	} else {
		refuse(c, "request", EINVAL, "unknown request, or a number that is not in 0..65535");
	}
}

static void serve_request(struct client *c)
{
	char request[REQUEST_MAX + 1];
	ssize_t size = recv(c->fd, request, REQUEST_MAX, MSG_DONTWAIT | MSG_TRUNC);

	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0) {
		drop(c);
	} else if (size > REQUEST_MAX || memchr(request, 0, (size_t)size)) {
		refuse(c, "request", EMSGSIZE, "a request is text of at most 64 bytes");
	} else {
		request[size] = 0;
		obey(c, request);
	}
}

/* A packet of stdin.  An empty one, or the end of what the client sends, ends its input; it may go on reading. */
static void serve_input(struct client *c)
{
	char *buffer = input_buffer();
	ssize_t size = buffer ? recv(c->fd, buffer, CHUNK, MSG_DONTWAIT | MSG_TRUNC) : -1;

	if (!buffer || (size < 0 && errno == EAGAIN))
		return;
	if (size > CHUNK) {
		report("an attached client sent a packet of more than 8192 bytes and was dropped", 0);
		drop(c);
	} else if (size > 0) {
		input_send((size_t)size);
	} else {
		c->input = false;
		if (once)
			input_close();
	}
}

static void catch_up(struct client *c)
{
	if (send(c->fd, last_packet, last_size, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		c->behind = false;
	else if (errno != EAGAIN)
		drop(c);
}

/* Sends a packet to all who are attached.  It must stay as it is while control_holds_output. */
void control_output(const char *packet, size_t size)
{
	last_packet = packet;
	last_size = size;
	held_since = monotonic_ms();
	for (struct client *c = clients; c < clients + CLIENTS_MAX; c++) {
		if (c->attached) {
			c->behind = true;
			catch_up(c);
		}
	}
}

bool control_holds_output(void)
{
	for (struct client *c = clients; c < clients + CLIENTS_MAX; c++)
		if (c->behind)
			return true;
	return false;
}

void control_drop_laggards(void)
{
	for (struct client *c = clients; c < clients + CLIENTS_MAX; c++)
		if (c->behind)
			drop(c);
}

static void dismiss(int fd, int number, const char *detail)
{
	struct client unwanted = {.fd = fd};

	refuse(&unwanted, "connect", number, detail);
	if (unwanted.fd)
		drop(&unwanted);
}

/* Accepts a client of our own user; where the socket's mode would do, the kernel's word is surer. */
static void accept_client(void)
{
	struct ucred peer;
	socklen_t size = sizeof peer;
	struct client *c = clients;
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0)
		return;
	while (c < clients + CLIENTS_MAX && c->fd)
		c++;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.uid != geteuid()) {
		dismiss(fd, EPERM, "only the monitor's own user may connect");
	} else if (c == clients + CLIENTS_MAX) {
		dismiss(fd, EBUSY, "64 clients are connected, no more can be");
	} else {
		c->fd = fd;
	}
}

/*
 * An attached client's packets stay in its socket while there is no room for them.  POLLHUP comes in any case, and
 * without POLLIN it ends the client: one that closes its socket, rather than its sending side, wants nothing more.
 */
void control_poll(struct pollfd *p, long long *deadline)
{
	bool held = false;

	for (int i = 0; i < CLIENTS_MAX; i++) {
		const struct client *c = &clients[i];
		bool reads = c->attached ? c->input && input_buffer() : true;
		p[i].fd = c->fd ? c->fd : -1;
		p[i].events = (short)((reads ? POLLIN : 0) | (c->behind ? POLLOUT : 0));
		held |= c->behind;
	}
	p[CLIENTS_MAX] = (struct pollfd){.fd = listener, .events = POLLIN};
	if (held && held_since + PATIENCE_MS < *deadline)
		*deadline = held_since + PATIENCE_MS;
}

void control_serve(const struct pollfd *p, long long now)
{
	for (int i = 0; i < CLIENTS_MAX; i++) {
		struct client *c = &clients[i];
		short ready = p[i].revents;
		if (c->fd != p[i].fd || !ready)
			continue;
		if (ready & POLLOUT && c->behind)
			catch_up(c);
		if (c->fd && ready & POLLIN)
			c->attached ? serve_input(c) : serve_request(c);
		else if (c->fd && ready & (POLLHUP | POLLERR))
			drop(c);
	}
	if (now >= held_since + PATIENCE_MS)
		control_drop_laggards();
	if (p[CLIENTS_MAX].revents)
		accept_client();
}

/* The answer to `start`, which came when execve succeeded (error of size 0) or did not. */
void control_started(const char *error, size_t size)
{
	for (struct client *c = clients; c < clients + CLIENTS_MAX; c++) {
		if (!c->starting)
			continue;
		c->starting = false;
		answer(c, size ? "error" : "ok", error, size);
	}
}

/* Tells the watchers, unless there is nothing to tell, and ends all clients. */
void control_ended(const char *exit, size_t size)
{
	for (struct client *c = clients; c < clients + CLIENTS_MAX; c++) {
		if (c->watching && size)
			answer(c, "exit", exit, size);
		if (c->fd)
			drop(c);
	}
}
