/*
 * Bounded text, JSON, last-resort messages and clocks.
 *
 * Instead of stdio, which would double the size of the program and bring buffers that nothing here needs.
 */
#include "monitor.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static void text_bytes(struct text *t, const char *s, size_t size)
{
	size_t left = t->room - t->size;

	if (size > left)
		size = left;
	memcpy(t->data + t->size, s, size);
	t->size += size;
}

void text_add(struct text *t, const char *s)
{
	text_bytes(t, s, strlen(s));
}

void text_number(struct text *t, long long n)
{
	char digits[20];
	size_t at = sizeof digits;
	unsigned long long rest = n < 0 ? 0 - (unsigned long long)n : (unsigned long long)n;

	do
		digits[--at] = (char)('0' + rest % 10);
	while (rest /= 10);
	if (n < 0)
		text_add(t, "-");
	text_bytes(t, digits + at, sizeof digits - at);
}

/* A JSON string of at most `most` bytes of s.  Bytes above 127 pass as they are: a path need not be UTF-8. */
static void text_json(struct text *t, const char *s, size_t most)
{
	static const char hex[] = "0123456789abcdef";

	text_add(t, "\"");
	for (; *s && most; s++, most--) {
		unsigned char c = (unsigned char)*s;
		if (c < 0x20) {
			text_add(t, "\\u00");
			text_bytes(t, &hex[c >> 4], 1);
			text_bytes(t, &hex[c & 15], 1);
		} else {
			if (c == '"' || c == '\\')
				text_add(t, "\\");
			text_bytes(t, s, 1);
		}
	}
	text_add(t, "\"");
}

/* The object always closes: the two strings, were every byte escaped, fill less than FAILURE_ROOM. */
void text_failure(struct text *t, const struct failure *f)
{
	text_add(t, "{\"step\":");
	text_json(t, f->step, 64);
	text_add(t, ",\"errno\":");
	text_number(t, f->number);
	text_add(t, ",\"path\":");
	text_json(t, f->path, 1000);
	text_add(t, ",\"detail\":");
	text_json(t, f->detail, 250);
	text_add(t, "}");
}

static const char *reporter = "";

void report_as(const char *id)
{
	reporter = id;
}

/* Says something on the daemon's stderr when there is nobody else to tell.  Never waits for the reader. */
void report(const char *what, int number)
{
	char line[512];
	struct text t = {line, 0, sizeof line - 1};

	text_add(&t, "crio-monitor ");
	text_add(&t, reporter);
	text_add(&t, ": ");
	text_add(&t, what);
	if (number) {
		text_add(&t, ": ");
		text_add(&t, strerror(number));
	}
	line[t.size++] = '\n';
	if (send(2, line, t.size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno == ENOTSOCK)
		(void)!write(2, line, t.size);
}

long long monotonic_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000LL + ts.tv_nsec / 1000000;
}

long long realtime_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}
