"""Every bound of the control plane, in one place; both sides use the same values.

Death and half-open connections are noticed by heartbeat frames inside the session, not by TCP: a peer
that has sent nothing for `HEARTBEAT_S * MAX_SILENT_TICKS` (2.5 s) is gone. Ticks are counted instead of
seconds, so that a process that was itself paused does not blame its peer when it wakes.
"""

from __future__ import annotations

PROTOCOL_VERSION = 1
SERVICE_NAME = "tandem.serving.v1.Worker"

HEARTBEAT_S = 0.5
MAX_SILENT_TICKS = 5
CONNECT_TIMEOUT_S = 3.0
RECONNECT_MIN_S = 0.05
RECONNECT_MAX_S = 1.0

MAX_MESSAGE_BYTES = 64 << 20
# A frame is cut when the entries in it (tokens, logprob alternatives) exceed this; an entry takes at
# most 16 bytes on the wire, so a frame stays below MAX_MESSAGE_BYTES with one oversized item to spare.
MAX_FRAME_ENTRIES = 1 << 20
# What may wait for a router that does not read; beyond it the session ends and its requests are cancelled.
MAX_PENDING_ENTRIES = 4 << 20
MAX_REQUESTS_PER_SESSION = 8192
MAX_INSPECT_TOKENS = 1 << 20

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a reconnect must not inherit another channel's backoff
    ("grpc.initial_reconnect_backoff_ms", 50),
    # gRPC's core takes this also as the time one connection attempt may last: a busy peer needs more
    # than a few milliseconds to answer the HTTP/2 preface.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # worker addresses are never behind a proxy
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a taken port must be an error, not a shared one
    ("grpc.max_concurrent_streams", 256),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)
