"""One tree of errors: when it happens, whose fault, whether a retry can help, its HTTP status.

    MillError
    ├── BadRequest           400  the client's: the message says which field and what to send instead
    │   └── ContextTooLong   400  code context_length_exceeded
    ├── NotAuthorised        401  no key, or one that opens nothing
    ├── PermissionDenied     403  a key that may not do this
    ├── ModelNotFound        404  code model_not_found
    ├── RequestTimeout       408  a body that did not come in time
    ├── TooLarge             413
    ├── RateLimited          429  retry after
    ├── NoEligibleWorker     503  nobody may serve this (residency, model): a retry helps only if the fleet changes
    ├── Overloaded           503  retry after: queue full or deadline out of reach
    ├── MeshUnavailable      503  retry after: no router or no bus
    ├── DeadlineExceeded     504
    └── WorkerFailed         500  a fault of ours; attempts are used up

Pure. Codes travel in `messages.Failed.code`; `from_code` turns them back into the error. A message that may quote
what a client sent is for that client: logs have `reason`.
"""


class MillError(Exception):
    """Base: `status` and `type` are what an OpenAI client sees."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retryable = False
    quotes = False  # the message may hold what a client sent

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str:
        """The message, for a log: but for one that may hold what a client sent, of which only the field is named."""
        return f"withheld, of {self.param or 'the body'}" if self.quotes else self.message


class BadRequest(MillError):
    status, type, code, quotes = 400, "invalid_request_error", "invalid_request", True


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class NotAuthorised(MillError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class PermissionDenied(MillError):
    status, type, code = 403, "permission_error", "permission_denied"


class ModelNotFound(MillError):
    status, type, code, quotes = 404, "invalid_request_error", "model_not_found", True


class RequestTimeout(MillError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class TooLarge(MillError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class RateLimited(MillError):
    status, type, code, retryable = 429, "rate_limit_error", "rate_limit_exceeded", True


class NoEligibleWorker(MillError):
    status, type, code = 503, "service_unavailable", "no_eligible_worker"


class Overloaded(MillError):
    status, type, code, retryable = 503, "service_unavailable", "overloaded", True


class MeshUnavailable(MillError):
    status, type, code, retryable = 503, "service_unavailable", "mesh_unavailable", True


class DeadlineExceeded(MillError):
    status, type, code = 504, "timeout_error", "deadline_exceeded"


class WorkerFailed(MillError):
    code, retryable = "worker_failed", True


_BY_CODE: dict[str, type[MillError]] = {
    kind.code: kind
    for kind in (BadRequest, ContextTooLong, NotAuthorised, PermissionDenied, ModelNotFound, RequestTimeout, TooLarge,
                 RateLimited, NoEligibleWorker, Overloaded, MeshUnavailable, DeadlineExceeded, WorkerFailed)
}

CODES = (MillError.code, *_BY_CODE)  # every code there is


def from_code(code: str, message: str, retry_after_s: float | None = None) -> MillError:
    """The error a `Failed` message stands for; an unknown code (a newer sender) becomes a plain MillError."""
    return _BY_CODE.get(code, MillError)(message, retry_after_s=retry_after_s)
