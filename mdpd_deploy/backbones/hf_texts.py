"""How a transformers text model wants its texts: its tokenizer, and how long they may be."""

from typing import Any

from mdpd_deploy.backbones.build import explaining, quiet_libraries
from mdpd_deploy.backbones.declared import declaration_of
from mdpd_deploy.backbones.family import LoadRequest
from mdpd_deploy.data.preprocess import TextPreprocess
from mdpd_deploy.errors import UserError

MEND = "Give the folder its tokenizer.json and tokenizer_config.json."
UNMASKED = ("siglip_text_model", "siglip2_text_model")  # trained on padded texts without a mask


def read_preprocess(
    where: str, facts: Any, arguments: dict[str, Any], request: LoadRequest, option: str
) -> TextPreprocess:
    """Read the tokenizer and check it against the embeddings.

    Args:
        where: A folder, or a name on the hub.
        facts: The encoder's config.
        arguments: For the library's loader.
        request: Gives the lengths.
        option: Names the model in messages.

    Raises:
        UserError: If it does not fit the model, the lengths, or what is kept of it.
    """
    from transformers import AutoTokenizer

    with quiet_libraries(), explaining(f"{option}: no tokenizer can be read", MEND):
        tokenizer = AutoTokenizer.from_pretrained(where, **arguments)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or tokenizer.pad_token_id is None:
        raise UserError(f"{option}: the tokenizer has no fast form or no padding token. {MEND}")
    if not len(tokenizer.all_special_tokens) < len(tokenizer) <= facts.vocab_size:
        raise UserError(
            f"{option}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{facts.vocab_size}: they do not belong together. {MEND}"
        )
    _check_length(facts, request.max_length, option)
    _check_settings(tokenizer, request.max_length, option)
    fast.enable_truncation(request.max_length, direction=tokenizer.truncation_side)
    segments = getattr(facts, "type_vocab_size", 0) > 1
    segments = segments and "token_type_ids" in tokenizer.model_input_names
    masked = facts.model_type not in UNMASKED
    names = ("attention_mask",) * masked + ("token_type_ids",) * segments
    return TextPreprocess(
        tokenizer=fast,
        input_names=("input_ids", *names),
        max_length=request.max_length,
        pad_id=tokenizer.pad_token_id,
        pad=request.pad if masked else "max",
    )


def _check_length(facts: Any, max_length: int, option: str) -> None:
    positions = getattr(facts, "max_position_embeddings", None) or max_length
    declared = declaration_of(facts)
    if declared is not None and declared.offset:
        positions -= facts.pad_token_id + 1
    if max_length > positions > 0:
        raise UserError(
            f"data.max_length={max_length} is more than the {positions} positions of "
            f"{option}: choose at most {positions}."
        )
    if facts.model_type in UNMASKED and max_length != positions:
        raise UserError(
            f"data.max_length={max_length}: {option} was trained on texts padded to {positions} "
            f"tokens and knows no mask; set data.max_length={positions}."
        )


def _check_settings(tokenizer: Any, max_length: int, option: str) -> None:
    """Refuse settings of the tokenizer that its fast form, which is all we keep, cannot carry."""
    own = tokenizer.model_max_length
    if own is not None and max_length > own:
        raise UserError(
            f"data.max_length={max_length} is more than the {own} tokens that {option} was made for "
            f"(model_max_length of its tokenizer): choose at most {own}."
        )
    strategy = tokenizer.init_kwargs.get("truncation_strategy", "longest_first")
    for name, value, kept in (
        ("padding_side", tokenizer.padding_side, "right"),
        ("split_special_tokens", tokenizer.split_special_tokens, False),
        ("truncation_strategy", strategy, "longest_first"),
    ):
        if value != kept:
            raise UserError(
                f"{option}: its tokenizer has {name}={value!r}, and texts are prepared with "
                f"{kept!r} here: set it so in tokenizer_config.json of a local copy."
            )
