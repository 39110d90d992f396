/*
 * The container's output as messages of the systemd journal, in its native protocol: a datagram for each line.
 *
 * Beside the log file, for who reads a node's journal.  Nothing here waits: what the journal does not take at once is
 * lost to it, as to any other sender, and is in the log all the same.
 */
#include "monitor.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

enum { SHORT_ID = 12, NAME_MOST = 1024 };

static const struct sockaddr_un journal = {AF_UNIX, "/run/systemd/journal/socket"};
static int journal_fd = -1;
static char fields[4 * NAME_MOST];
static size_t fields_size;
static bool refused;

/* 0 or an errno.  Each message is sent to the socket's path, so a journal that is started later, or anew, is found. */
int journal_open(const char *id, const char *name)
{
	struct text t = {fields, 0, sizeof fields};
	char brief[SHORT_ID + 1] = "";

	if (strlen(id) > NAME_MOST || strlen(name) > NAME_MOST || strchr(id, '\n') || strchr(name, '\n'))
		return EINVAL;
	strncat(brief, id, SHORT_ID);
	text_add(&t, "SYSLOG_IDENTIFIER=");
	text_add(&t, name);
	text_add(&t, "\nCONTAINER_NAME=");
	text_add(&t, name);
	text_add(&t, "\nCONTAINER_ID=");
	text_add(&t, brief);
	text_add(&t, "\nCONTAINER_ID_FULL=");
	text_add(&t, id);
	text_add(&t, "\n");
	fields_size = t.size;
	journal_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	return journal_fd < 0 ? errno : 0;
}

static void send_line(bool error, bool whole, const char *line, size_t size)
{
	const char *priority = error ? "PRIORITY=3\n" : "PRIORITY=6\n";
	const char *partial = whole ? "" : "CONTAINER_PARTIAL_MESSAGE=true\n";
	unsigned char length[8];

	for (size_t i = 0, rest = size; i < sizeof length; i++, rest >>= 8)
		length[i] = (unsigned char)rest; /* little endian; a value with a length may hold any byte */
	struct iovec parts[] = {
		{(char *)priority, strlen(priority)}, {fields, fields_size}, {(char *)partial, strlen(partial)},
		{"MESSAGE\n", 8}, {length, sizeof length}, {(char *)line, size}, {"\n", 1},
	};
	struct msghdr message = {
		.msg_name = (void *)&journal, .msg_namelen = sizeof journal,
		.msg_iov = parts, .msg_iovlen = sizeof parts / sizeof *parts,
	};
	if (sendmsg(journal_fd, &message, MSG_NOSIGNAL) < 0 && !refused) {
		refused = true; /* once in a container's life: a journal that is full is full for all */
		report("output is missing in the journal", errno);
	}
}

/* Sends what one read of "stdout" or "stderr" brought. */
void journal_write(const char *stream, const char *data, size_t left)
{
	while (journal_fd >= 0 && left) {
		const char *newline = memchr(data, '\n', left);
		size_t size = newline ? (size_t)(newline - data) : left;

		send_line(strcmp(stream, "stderr") == 0, newline != NULL, data, size);
		data += size + !!newline;
		left -= size + !!newline;
	}
}
