# Read by the other scripts: what every process of a training gets, where the environment does not say it already.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}    # kernels of TP start in the order asked for
# Packs differ in length from step to step; in segments of fixed size their memory would break into pieces.
[ -n "${PYTORCH_ALLOC_CONF:-}" ] || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# On a disk of this machine: on a shared one, all ranks of all machines would write the same compiled kernels at once.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}
say_environment() { env | grep -E '^(CUDA_DEVICE|GLOO|NCCL|OMP|PYTORCH|TORCH|TRITON)' | sort | tr '\n' ' '; }
# What torchrun starts: a training, or with the word evaluate in the place of the configuration `moba-megatron evaluate`.
program_of() { if [ "$1" = evaluate ]; then program=(-m moba_megatron); else program=(train.py); fi; }
