"""Names of spans, attributes and histogram buckets, in one place because the conventions still move.

Source: OpenTelemetry GenAI semantic conventions (status: development), the `gen_ai.latency.*` keys that vLLM and SGLang
emit alike, and `mill.*` for what only this mesh has. Pure.
"""

PROVIDER = "tokenmill"  # value of gen_ai.provider.name

OPERATION_NAME = "gen_ai.operation.name"  # chat, text_completion, embeddings
PROVIDER_NAME = "gen_ai.provider.name"
REQUEST_ID = "gen_ai.request.id"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_SEED = "gen_ai.request.seed"
REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
REQUEST_STREAM = "gen_ai.request.stream"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"  # cached ones included
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"  # reasoning included
USAGE_CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
USAGE_REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
LATENCY_IN_QUEUE = "gen_ai.latency.time_in_queue"
LATENCY_FIRST_TOKEN = "gen_ai.latency.time_to_first_token"
LATENCY_PREFILL = "gen_ai.latency.time_in_model_prefill"
LATENCY_DECODE = "gen_ai.latency.time_in_model_decode"
LATENCY_END_TO_END = "gen_ai.latency.e2e"
ERROR_TYPE = "error.type"  # a code of shared.errors
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
HTTP_STATUS = "http.response.status_code"
HTTP_ROUTE = "http.route"

TENANT = "mill.tenant"
ATTEMPT = "mill.attempt"
WORKER = "mill.worker"
ROUTER = "mill.router"
DRAFTER = "mill.drafter"
GATEWAY = "mill.gateway"
ZONE = "mill.zone"
RESIDENCY = "mill.residency"
PLACEMENT_POLICY = "mill.placement.policy"
PLACEMENT_CANDIDATES = "mill.placement.candidates"
PLACEMENT_CACHED_TOKENS = "mill.placement.cached_tokens"  # what the router expected
PLACEMENT_CERTAIN_TOKENS = "mill.placement.certain_tokens"  # of these, what the worker had said itself
PLACEMENT_MOST_CACHED_TOKENS = "mill.placement.most_cached_tokens"  # the most that any eligible worker held
PLACEMENT_BECAUSE = "mill.placement.because"  # what decided: cost, price, cache, hint, chance or a policy
PLACEMENT_RUNNER_UP = "mill.placement.runner_up"
PLACEMENT_ESTIMATE_S = "mill.placement.estimate_s"
CACHED_TOKENS = "mill.cached_tokens"  # what the worker had
CACHE_MISS = "mill.cache_miss"  # a class of shared.receipts
DRAFT_TOKENS = "mill.draft.tokens"
DRAFT_ACCEPTED_TOKENS = "mill.draft.accepted_tokens"
DRAFT_LATE_TOKENS = "mill.draft.late_tokens"  # proposed for places that were taken when they came
DRAFT_SAVED_S = "mill.draft.saved_s"  # verification and waits taken off; below 0: lost
DRAFTER_S = "mill.drafter.seconds"  # that it worked on this request
DRAFTER_USD = "mill.drafter.usd"

# Histograms in seconds. The first three sets of buckets belong to the convention; its time per token ends at 10 ms, too
# coarse where speculation works, hence the fourth. What a grammar permits is found out in the last.
REQUEST_DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"
REQUEST_DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TIME_TO_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
                               10.0)
TIME_PER_OUTPUT_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
FINE_TIME_PER_OUTPUT_TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, *TIME_PER_OUTPUT_TOKEN_BUCKETS)
MASK_BUCKETS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
