/*
 * What the monitor's files know of each other, a section for each.
 *
 * The monitor is one container's parent: it holds the container's output, terminal and exit status while the daemon
 * may come and go.  docs/architecture.md specifies its descriptors, packets and files; this header only names them.
 * It has one thread, one loop in main.c, no signal handlers and no heap: every buffer is static and bounded, and a page
 * that was never written costs nothing.
 */
#ifndef MONITOR_H
#define MONITOR_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

enum { SYNC_FD = 3, REPLY_FD = 4, RUN_DIR_FD = 5, STDIN_FD = 6, STDOUT_FD = 7, STDERR_FD = 8 };

enum {
	CHUNK = 8192,        /* most bytes in one read of output and in one attach packet; the size of CRI-O's log records */
	PACKET_MAX = 16384,  /* most bytes in a packet of the init */
	STREAM_STDOUT = 2,   /* first byte of an attach packet */
	STREAM_STDERR = 3,
};

/* text.c: bounded text, JSON, messages, clocks.  What does not fit is cut off. */
struct text {
	char *data;
	size_t size, room;
};

/* A failure as the daemon reads it (StepFailed): path and detail may be "", number 0 when no system call failed. */
struct failure {
	const char *step;
	int number;
	const char *path, *detail;
};

enum { FAILURE_ROOM = 8192 };

void text_add(struct text *t, const char *s);
void text_number(struct text *t, long long n);
void text_failure(struct text *t, const struct failure *f);

void report_as(const char *id);
void report(const char *what, int number);

long long monotonic_ms(void);
long long realtime_ns(void);

/* init.c: the container's first process and everything it leaves behind. */
bool init_adopt(pid_t pid);
pid_t init_pid(void);
void init_expect(pid_t donor);
void init_end_donor(void);
bool init_born(pid_t pid);
bool init_reap(void);
bool init_ended(void);
int init_kill(int signal);
bool init_destroy(int patience_ms);
bool init_has_execed(void);
void init_watch_oom(const char *path);
void init_wait_status(struct text *t);
void init_exit(struct text *t, bool start_failed);

/* log.c: the container's log file. */
void log_sync(void);
int log_open(const char *path, long long size_max);
int log_reopen(void);
void log_write(const char *stream, const char *data, size_t size);
void log_close(void);

/* journal.c: the same output in the systemd journal. */
int journal_open(const char *id, const char *name);
void journal_write(const char *stream, const char *data, size_t size);

/* streams.c: the container's ends of stdin, stdout and stderr, or its terminal. */
enum { STREAM_SLOTS = 3 };

int streams_open(bool has_stdin);
int streams_terminal(int master);
bool streams_have_terminal(void);
void streams_poll(struct pollfd *p, long long now, long long *deadline);
void streams_serve(const struct pollfd *p);
bool streams_finished(void);
void streams_drain(void);
int streams_resize(unsigned short height, unsigned short width);
char *input_buffer(void);
void input_send(size_t size);
int input_close(void);

/* control.c: the control socket, its clients, and who is attached. */
enum { CLIENTS_MAX = 64, CONTROL_SLOTS = CLIENTS_MAX + 1 };

int control_listen(bool stdin_once);
void control_take(int fd);
void control_remove(void);
void control_poll(struct pollfd *p, long long *deadline);
void control_serve(const struct pollfd *p, long long now);
void control_output(const char *packet, size_t size);
bool control_holds_output(void);
void control_drop_laggards(void);
void control_started(const char *error, size_t size);
void control_ended(const char *exit, size_t size);

/* main.c: called by control.c for `start`; 0 or an errno. */
int container_start(void);

/* remote.c: `crio-monitor remote`, and what its clients tell it. */
int remote_main(char **arguments);
int remote_ended(const char *text);
int remote_lost(void);

/* pause.c */
int pause_main(void);

#endif
