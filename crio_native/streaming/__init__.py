"""Exec, attach and port-forward: the HTTP/1.1 server to which the CRI's Exec, Attach and PortForward send a client.

Here belongs what carries bytes between a client's connection and a process or a port: tokens, the upgrade of a
connection, SPDY/3.1 and WebSocket, the remotecommand and portforward protocols, back-pressure.  What the bytes reach
is handed in as `Program`s and sockets; which container that is, and who may reach it, is decided in `cri/`.

settings      how to serve                                  tokens       what a URL stands for, once
server        the listener and its URLs                     tls          certificates that are replaced
service       its thread: requests, and their sessions      wires        connections and other descriptors
reception     who connects, and how many may
http          requests and upgrades (h11)                   sessions     SPDY connections on the loop
spdy          SPDY/3.1 frames, without I/O                  programs     an exec'ed process, an attachment
websocket     messages (wsproto), and SPDY inside them      portforward  connections into a pod
remotecommand the streams of a command, and its end         portchannels the same by numbered WebSocket channels
"""
