#!/usr/bin/env bash
# transformers' generate, with PEFT's adapter_names where rows have adapters, in a process that answers lines
# (hf_peft_child.py): one static batch of equally long prompts.
#   hf_peft.sh setup
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DTYPE="${HF_DTYPE:-$(torch_dtype)}"
verb="${1:-}"; shift || true
case "$verb" in
  setup) "$PEERS/models.sh" setup ;;
  check) [ -d "$(compgen -G "$VENVS/hf/lib/python*/site-packages/peft" | head -1)" ] ;;
  version) echo "transformers $(version_of hf transformers), peft $(version_of hf peft), torch $(version_of hf torch), computing in $DTYPE" ;;
  child-command) # MODEL ADAPTERS
    model="$1"; mapfile -t names < <(adapter_names "$2")
    lines "${OFFLINE[@]}" "$VENVS/hf/bin/python" "$PEERS/hf_peft_child.py" "$model" "$DTYPE" "${names[@]/#/$ADAPTERS/}" ;;
  *) usage ;;
esac
