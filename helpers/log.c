/*
 * The container's log file, in the CRI format: `TIME STREAM P|F CONTENT\n`.
 *
 * One read of output is one call of log_write and one timestamp.  Each line in it is a record F; what follows the last
 * newline is a record P, which later reads continue.  The kubelet joins them, and relies on exactly this.
 */
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
	RECORDS = 40,          /* records in one writev */
	PARTS = 3,             /* of a record: head, content, newline */
	HEAD_ROOM = 64,        /* "2026-08-01T12:34:56.123456789Z stdout F " */
	COMPLAIN_EVERY = 60000, /* ms between two complaints */
};

static int log_fd = -1;
static bool sync_wanted;
static const char *path;
static long long size_max, size; /* size_max <= 0: no limit */
static long long lost, lost_reported, complained_at;

/*
 * Opens a regular file for appending, or -1 with errno.  O_NONBLOCK, because opening a FIFO would wait for a reader;
 * O_NOFOLLOW, because whoever may write in the log directory could point a link at any file of the host.
 */
static int open_log(const char *name, int flags)
{
	struct stat st;
	int fd = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | flags, 0640);

	if (fd < 0) {
		if (errno == ENXIO) /* a FIFO that nobody reads, or a socket */
			errno = EINVAL;
		return -1;
	}
	if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
		close(fd);
		errno = EINVAL;
		return -1;
	}
	size = st.st_size;
	return fd;
}

static void use(int fd)
{
	if (log_fd >= 0 && sync_wanted)
		fdatasync(log_fd);
	if (log_fd >= 0)
		close(log_fd);
	log_fd = fd;
}

/* A file of the log is flushed to the disk when another takes its place, and at the end. */
void log_sync(void)
{
	sync_wanted = true;
}

/* 0 or an errno; EINVAL also when the path names something that is not a regular file. */
int log_open(const char *log_path, long long log_size_max)
{
	path = log_path;
	size_max = log_size_max;
	return log_reopen();
}

/* Begins the file at the same path again, after someone renamed it.  When that fails the old file stays in use. */
int log_reopen(void)
{
	if (!path)
		return 0;
	int fd = open_log(path, 0);
	if (fd < 0)
		return errno;
	use(fd);
	return 0;
}

/* Reports, but not as often as a container can make a full disk fail. */
static bool complain(const char *what, int number)
{
	if (complained_at && monotonic_ms() - complained_at < COMPLAIN_EVERY)
		return false;
	complained_at = monotonic_ms();
	report(what, number);
	return true;
}

/* Puts an empty file at the path, by a rename: a reader of the full one reads on to its end. */
static void start_over(void)
{
	char temporary[PATH_MAX];
	struct text t = {temporary, 0, sizeof temporary - 1};
	long long full = size;

	text_add(&t, path);
	text_add(&t, ".tmp");
	temporary[t.size] = 0;
	int fd = open_log(temporary, O_TRUNC);
	if (fd < 0 || rename(temporary, path) < 0) {
		complain("cannot replace the full log file, it grows on", errno);
		if (fd >= 0) {
			close(fd);
			unlink(temporary);
		}
		size = full;
		return;
	}
	use(fd);
}

static size_t record_size(const struct iovec *record)
{
	return record[0].iov_len + record[1].iov_len + record[2].iov_len;
}

static void lose(const struct iovec *records, int count, int number)
{
	for (int i = 0; i < count; i++)
		lost += (long long)records[PARTS * i + 1].iov_len;
	if (complain("output is lost, the log cannot be written", number))
		lost_reported = lost;
}

/*
 * Appends whole records or none: a full disk may take part of one, which is cut off again, so that what is written
 * once there is room begins on a line of its own.  Records that do not fit are lost; the container is never held up.
 */
static void append(struct iovec *records, int count)
{
	while (count) {
		ssize_t written = writev(log_fd, records, PARTS * count);
		if (written < 0 && errno == EINTR)
			continue;
		if (written < 0) {
			lose(records, count, errno);
			return;
		}

		size_t torn = (size_t)written;
		int whole = 0;
		for (; whole < count && torn >= record_size(records + PARTS * whole); whole++) {
			torn -= record_size(records + PARTS * whole);
			size += (long long)record_size(records + PARTS * whole);
		}
		struct stat st;
		if (torn && fstat(log_fd, &st) == 0 && ftruncate(log_fd, st.st_size - (off_t)torn) < 0)
			complain("cannot cut a torn record off the log", errno);
		if (!whole) {
			lose(records, count, ENOSPC);
			return;
		}
		records += PARTS * whole;
		count -= whole;
	}
}

static char *two_digits(char *at, int n)
{
	*at++ = (char)('0' + n / 10);
	*at++ = (char)('0' + n % 10);
	return at;
}

/* "TIME STREAM P ", TIME as RFC 3339 in UTC with nine digits of a second; the returned size is up to the tag. */
static size_t make_head(char *head, const char *stream)
{
	struct timespec now;
	struct tm tm;
	char *at = head;

	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &tm);
	at = two_digits(at, (tm.tm_year + 1900) / 100);
	at = two_digits(at, tm.tm_year % 100);
	*at++ = '-';
	at = two_digits(at, tm.tm_mon + 1);
	*at++ = '-';
	at = two_digits(at, tm.tm_mday);
	*at++ = 'T';
	at = two_digits(at, tm.tm_hour);
	*at++ = ':';
	at = two_digits(at, tm.tm_min);
	*at++ = ':';
	at = two_digits(at, tm.tm_sec);
	*at++ = '.';
	for (long unit = 100000000; unit; unit /= 10)
		*at++ = (char)('0' + now.tv_nsec / unit % 10);
	*at++ = 'Z';
	*at++ = ' ';
	at = stpcpy(at, stream);
	memcpy(at, " P ", 3);
	return (size_t)(at + 3 - head);
}

/* Logs what one read of "stdout" or "stderr" brought. */
void log_write(const char *stream, const char *data, size_t left)
{
	char partial[HEAD_ROOM], full[HEAD_ROOM];
	struct iovec parts[PARTS * RECORDS];
	int count = 0;
	size_t queued = 0;

	if (log_fd < 0)
		return;
	size_t head = make_head(partial, stream);
	memcpy(full, partial, head);
	full[head - 2] = 'F';

	while (left) {
		const char *newline = memchr(data, '\n', left);
		size_t content = newline ? (size_t)(newline - data) : left;
		size_t record = head + content + 1;

		bool over = size_max > 0 && size + (long long)(queued + record) > size_max;
		if (over || count == RECORDS) {
			append(parts, count);
			count = 0;
			queued = 0;
		}
		if (over && size)
			start_over();
		parts[PARTS * count] = (struct iovec){newline ? full : partial, head};
		parts[PARTS * count + 1] = (struct iovec){(char *)data, content};
		parts[PARTS * count + 2] = (struct iovec){"\n", 1};
		count++;
		queued += record;
		data += content + !!newline;
		left -= content + !!newline;
	}
	append(parts, count);
}

/* Says how much was lost, if that was not said yet. */
void log_close(void)
{
	char line[96];
	struct text t = {line, 0, sizeof line - 1};

	if (lost > lost_reported) {
		text_number(&t, lost);
		text_add(&t, " bytes of output were lost in all");
		line[t.size] = 0;
		report(line, 0);
	}
	use(-1);
}
