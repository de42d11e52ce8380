"""The names of other programs for our flags, as tables; `mori.cli.aliases` looks them up.

Sources: the documentation of transformers (TrainingArguments, GenerationConfig, run_clm.py, run_generation.py), TRL, PEFT, Unsloth,
axolotl, LLaMA-Factory, Lightning, accelerate and llama.cpp, and nanoGPT's `config/` and `sample.py`.
"""

import contextlib
import os
from dataclasses import dataclass

from mori.cli.errors import UserError

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
ON = frozenset({*_TRUE, "1.0", "auto"})
OFF = frozenset({*_FALSE, "0.0", "none", "null", "", "[]", "{}", "-1", "disabled", "false.", "('',)"})
NEVER: frozenset = frozenset()


@dataclass(frozen=True)
class Otherwise:
    """The value of a field that nothing else sets; a field that is set to `excluded` contradicts it."""

    value: object
    excluded: object = None


def is_boolean(value) -> bool:
    """Whether a value stands for True or False."""
    return str(value).lower() in _TRUE + _FALSE


def boolean(name: str, value) -> bool:
    """Read True or False, also as a word. Raises UserError for anything else."""
    if not is_boolean(value):
        raise UserError(f"{name} is {value!r}, must be True or False")
    return str(value).lower() in _TRUE


# Our field: the names that mean exactly the same. A name with a dash in front is a short flag.
SAME = {
    "model": "model_name_or_path model_name base_model model_id model_path pretrained_model pretrained_model_name_or_path hf_model -m",
    "corpus": "train_file train_files training_file train_data training_data train_data_file data_file data_files data_path text_file "
    "text_files corpus_file corpus_path",
    "validation_file": "validation_files eval_file eval_data_file eval_data valid_file val_file val_data validation_data",
    "text_column": "text_column_name dataset_text_field text_field text_key",
    "block_size": "max_seq_length max_seq_len seq_length seq_len sequence_len sequence_length max_sequence_length context_length "
    "context_size max_length model_max_length cutoff_len n_ctx ctx_len ctx_size",
    "held_out_fraction": "val_size val_set_size validation_split val_split val_fraction eval_fraction validation_fraction test_size",
    "max_eval_windows": "max_eval_samples",
    "per_device_train_batch_size": "per_gpu_train_batch_size micro_batch_size train_micro_batch_size_per_gpu device_batch_size "
    "per_device_batch_size mini_batch_size",
    "per_device_eval_batch_size": "per_gpu_eval_batch_size eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accum_steps grad_accumulation_steps accumulation_steps "
    "accumulate_grad_batches gradient_accumulation_step",
    "num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "max_iters max_train_steps num_train_steps num_steps n_steps num_iterations max_iterations iters steps total_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler lr_schedule scheduler scheduler_type schedule",
    "warmup_steps": "warmup_iters num_warmup_steps lr_warmup_steps warmup",
    "weight_decay": "wd",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "adam_eps eps epsilon",
    "max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clip_val gradient_clipping grad_norm_clip max_norm",
    "optim": "optimizer optimizer_name optimizer_type",
    "precision": "mixed_precision",
    "dropout": "dropout_rate",
    "use_peft": "use_lora lora",
    "lora_r": "lora_rank rank",
    "lora_target_modules": "lora_target target_modules lora_modules",
    "lora_modules_to_save": "modules_to_save additional_target",
    "load_in_4bit": "use_4bit qlora",
    "seed": "random_seed random_state rng_seed manual_seed -s",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing grad_checkpoint checkpoint_activations",
    "torch_compile": "compile compile_model use_compile",
    "tf32": "allow_tf32",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "eval_interval eval_every eval_freq steps_per_eval evaluation_steps val_check_interval",
    "logging_steps": "log_interval log_every log_steps log_freq logging_interval log_every_n_steps steps_per_report print_every",
    "save_steps": "save_interval save_every save_freq checkpoint_interval ckpt_interval checkpoint_every checkpointing_steps",
    "save_total_limit": "max_checkpoints keep_checkpoints",
    "async_save": "async_checkpointing enable_async_checkpointing",
    "output_dir": "out_dir output output_path save_dir save_path -o",
    "logging_dir": "log_dir runs_dir tensorboard_dir logdir",
    "run_name": "experiment_name exp_name",
    "resume_from_checkpoint": "resume resume_from resume_from_ckpt resume_ckpt_path ckpt_path",
    "max_new_tokens": "n_predict predict num_predict max_tokens max_gen_tokens max_output_tokens max_completion_tokens "
    "tokens_to_generate length -n",
    "num_return_sequences": "num_samples n_samples num_sequences n",
    "prompt": "prompts prompt_text -p",
    "prompt_file": "prompts_file file -f",
    "temperature": "temp",
    "top_k": "k",
    "top_p": "p nucleus",
    "typical_p": "typical",
    "repetition_penalty": "repeat_penalty rep_pen",
    "stop_strings": "stop stop_sequences stop_words stop_token reverse_prompt antiprompt -r",
    "interactive": "chat conversation -i -cnv",
    "threads": "num_threads n_threads -t",
    "hub_model_id": "push_to_hub_model_id hub_repo hub_repo_id hub_path repo_id export_hub_model_id",
    "hub_private_repo": "private private_repo hub_private export_hub_private_repo",
}

# Our field: what other programs call its values, in lower case.
VALUES = {
    "optim": {
        "adamw": "adamw_torch", "adamw_hf": "adamw_torch", "adam": "adamw_torch", "fused_adamw": "adamw_torch_fused",
        "adamw_8bit": "adamw_bnb_8bit", "adamw8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit",
    },
    "lr_scheduler_type": {"wsd": "warmup_stable_decay", "cosine_with_warmup": "cosine", "linear_with_warmup": "linear"},
    "precision": {
        "no": "fp32", "32": "fp32", "32-true": "fp32", "float32": "fp32", "false": "fp32", "16": "fp16", "float16": "fp16",
        "16-mixed": "fp16", "half": "fp16", "bfloat16": "bf16", "bf16-mixed": "bf16", "torch.bfloat16": "bf16",
        "torch.float16": "fp16", "torch.float32": "fp32",
    },
    "dtype": {"fp32": "float32", "torch.float32": "float32", "bf16": "bfloat16", "torch.bfloat16": "bfloat16"},
    "gradient_checkpointing": {"unsloth": True},
    "resume_from_checkpoint": {"true": "auto", "latest": "auto", "last": "auto", "false": "none"},
    "device": {"gpu": "cuda"},
    "fsdp": {
        "true": "full_shard", "false": "none", "": "none", "full_shard auto_wrap": "full_shard",
        "shard_grad_op auto_wrap": "shard_grad_op", "hybrid_shard auto_wrap": "hybrid_shard",
    },
    "eval_strategy": {"steps": "steps", "false": "no"},
    "report_to": {"all": "tensorboard", "true": "tensorboard", "tb": "tensorboard", "false": "none", "": "none"},
}  # fmt: skip


def _half(known, name, value):
    """TrainingArguments: `--bf16` and `--fp16` are switches, and neither means fp32."""
    if str(value).lower() == "auto":
        return {"precision": "auto"}
    return {"precision": name if boolean(name, value) else Otherwise("fp32", excluded=name)}


def _fp32(known, name, value):
    return {"precision": "fp32" if boolean(name, value) else Otherwise("auto", excluded="fp32")}


def _on_cpu(known, name, value):
    return {"device": "cpu" if boolean(name, value) else Otherwise("auto", excluded="cpu")}


def _share(name, value, whole: float) -> float:
    """`value` as a part of `whole`. Raises UserError unless it is from 0 to below `whole`."""
    with contextlib.suppress(ValueError, TypeError):
        if 0 <= float(value) < whole:
            return float(value) / whole
    raise UserError(f"{name} is {value!r}, must be a number of 0 or more and below {whole:g}")


def _warmup_ratio(known, name, value):
    return {"warmup_steps": _share(name, value, 1)}


def _percentage(known, name, value):
    return {"held_out_fraction": _share(name, value, 100)}


def _model_dtype(known, name, value):
    """run_clm.py and TRL: the type of the weights, in which the model also computes."""
    word = str(value).lower().removeprefix("torch.")
    if word in ("auto", "none", "float32", "fp32"):
        return {}
    if word in ("bfloat16", "bf16") and "dtype" in known:
        return {"dtype": "bfloat16"} | ({"precision": Otherwise("bf16")} if "precision" in known else {})
    if word in ("float16", "fp16", "half", "bfloat16", "bf16") and "precision" in known:
        short = "bf16" if word.startswith("b") else "fp16"
        raise UserError(f"{name}: the weights stay in float32 here; --precision {short} computes in {value}")
    if "precision" in known:
        raise UserError(f"{name} is {value!r}, must be float32 or bfloat16")
    raise UserError(f"{name}: the weights stay in the type in which they are stored")


def _batch_size(known, name, value):
    if "per_device_train_batch_size" in known:
        raise UserError(
            f"{name}: --per_device_train_batch_size counts the windows in one micro-batch on each device; a step takes "
            "--gradient_accumulation_steps of them"
        )
    return {"per_device_eval_batch_size": value}


def _dataset(known, name, value):
    """A path of a text is a corpus; a data set on the hub is refused."""
    first = str(value[0] if isinstance(value, list) else value)
    if os.path.exists(first) or os.path.splitext(first)[1] or "*" in first:
        return {"corpus": value}
    raise UserError(
        f"{name}: data sets of the hub are not downloaded here; save {first!r} once as a text or JSON lines file "
        "(datasets.load_dataset(...).to_json(...)) and pass --corpus FILE"
    )


def _wandb(known, name, value):
    """nanoGPT and nanochat: whether to log to Weights & Biases too."""
    return {"report_to": ["tensorboard", "wandb"]} if boolean(name, value) else {}


def _do_eval(known, name, value):
    return {} if boolean(name, value) or "eval_strategy" not in known else {"eval_strategy": Otherwise("no")}


def _sample(known, name, value):
    """generate(): without `do_sample` decoding is greedy."""
    sampled = boolean(name, value) != (name == "greedy")
    return {} if sampled else {"temperature": 0.0}


def _decay_lr(known, name, value):
    return {} if boolean(name, value) else {"lr_scheduler_type": "constant_with_warmup"}


def _init_from(known, name, value):
    """nanoGPT: `scratch`, `resume`, or a model of the hub."""
    if value == "resume":
        return {"resume_from_checkpoint": "auto"} if "resume_from_checkpoint" in known else {}
    return {"model": "mini" if value == "scratch" else value}


def _start(known, name, value):
    """nanoGPT: a prompt, or FILE: and a file that holds it."""
    text = str(value)
    return {"prompt_file": text[5:]} if text.startswith("FILE:") else {"prompt": value}


def _context_shift(known, name, value):
    return {"on_full_context": "slide" if boolean(name, value) else "stop"}


# A name: the function of this command's fields, the name and the value that gives the fields it sets.
CHANGES = {
    "bf16": _half,
    "fp16": _half,
    "fp32": _fp32,
    "use_cpu": _on_cpu,
    "no_cuda": _on_cpu,
    "cpu": _on_cpu,
    "warmup_ratio": _warmup_ratio,
    "validation_split_percentage": _percentage,
    "torch_dtype": _model_dtype,
    "model_dtype": _model_dtype,
    "batch_size": _batch_size,
    "train_batch_size": _batch_size,
    "dataset": _dataset,
    "datasets": _dataset,
    "data": _dataset,
    "dataset_name": _dataset,
    "dataset_path": _dataset,
    "wandb": _wandb,
    "wandb_log": _wandb,
    "use_wandb": _wandb,
    "do_eval": _do_eval,
    "do_sample": _sample,
    "greedy": _sample,
    "decay_lr": _decay_lr,
    "init_from": _init_from,
    "start": _start,
    "context_shift": _context_shift,
}

# What stands for a token in a dump of TrainingArguments, and what asks for the token of the login.
_NO_TOKEN = ON | OFF | {"<hub_token>", "<push_to_hub_token>"}
_ADAPTERS = (
    "adapters are LoRA here: --use_peft trains them beside the frozen model, and --model takes a folder with one"
)
_QUANTIZATION = (
    "--load_in_4bit holds the frozen weights of a run with --use_peft in NF4; there is no other quantization"
)
_NO_SHARDING = (
    "weights, gradients and moments are sharded by --fsdp (full_shard, shard_grad_op or hybrid_shard), each layer by itself; there "
    "is nothing else to set"
)

# Names (`*` stands for anything), the values that hold anyway and are taken, and the answer to any other value. An answer counts
# for the commands that have every flag it names.
ANSWERS = [
    ("do_train", ON, "a run always trains; scripts/evaluate.py evaluates a model without training"),
    ("do_predict eval_only", OFF, "scripts/evaluate.py evaluates a model on a text, scripts/generate.py writes with it"),
    ("save_safetensors", ON, "weights are always saved as safetensors"),
    ("packing sample_packing eval_packing eval_sample_packing pack", ON, "windows are always full: documents follow each other, and nothing is padded"),
    ("streaming average_tokens_across_devices log_on_each_node dataloader_pin_memory dataloader_in_order remove_unused_columns skip_memory_metrics use_cache", ON | OFF, ""),
    ("attn_implementation", frozenset({"sdpa", "flash_attention_2", "flash_attention_3", "none", "auto"}), "attention is PyTorch's scaled_dot_product_attention"),
    ("flash_attn flash_attention use_flash_attn use_flash_attention_2 sdp_attention", ON | OFF | {"fa2", "sdpa"}, ""),
    ("xformers_attention xformers", OFF, "attention is PyTorch's scaled_dot_product_attention, which chooses the fastest kernel"),
    ("use_peft use_lora lora lora_* r peft_* adapter adapter_* finetuning_type use_dora loftq_config relora*", OFF | {"full", "lora_off"}, _ADAPTERS),
    ("lora lora_* adapter adapter_*", OFF, "--model takes the folder of an adapter, which names its base model"),
    ("load_in_8bit use_bnb* bnb_* quantization quantization_* quantize double_quantization gptq", OFF, _QUANTIZATION),
    ("load_in_4bit load_in_8bit bnb_* quantization quantize", OFF, "weights are not quantized here; they stay in the type in which they are stored"),
    ("fsdp_* deepspeed deepspeed_* zero_stage zero tensor_parallel* pipeline_parallel* parallelism_config context_parallel*", OFF, _NO_SHARDING),
    ("label_smoothing_factor label_smoothing", OFF, "label smoothing is not here: the loss is plain cross-entropy"),
    ("neftune_noise_alpha neftune*", OFF, "NEFTune's noise is not here; --dropout regularizes"),
    ("dataloader_drop_last drop_last", OFF, "the last, smaller batch of an epoch is trained on too"),
    ("group_by_length length_column_name train_sampling_strategy", OFF | {"random", "length"}, "all windows have the same length, so there is nothing to group; their order is random"),
    ("data_seed", NEVER, "--seed sets the order of the windows too"),
    ("tokenizer_name tokenizer tokenizer_path", OFF, "the tokenizer is the model's own; save another one into the model's folder and pass --model FOLDER"),
    ("config_name config_overrides model_type n_layer n_head n_embd bias num_hidden_layers hidden_size", NEVER, "the model's shape comes from its config.json; make a folder with AutoModelForCausalLM.from_config(...) and pass --model FOLDER"),
    ("model_revision revision", OFF | {"main"}, "the newest revision is taken; download another one with `hf download` and pass its folder as --model"),
    ("dataset_config_name dataset_config dataset_dir", OFF, "data sets of the hub are not downloaded here; save the text as a file and pass --corpus FILE"),
    ("dataset_train_split dataset_test_split", NEVER, "--corpus is what is trained on, --validation_file another text to evaluate on"),
    ("max_train_samples max_samples", OFF, "the whole corpus is trained on; --max_steps bounds the run, a shorter file the text"),
    ("eval_iters", NEVER, "--max_eval_windows bounds an evaluation, in windows instead of batches"),
    ("freeze* unfreeze* num_freeze_layers optim_target_modules", OFF, "--freeze_trainable_layers N trains the last N layers and freezes the others"),
    ("dry_run", OFF, "every mistake is reported before the first step; --max_steps 2 with another --output_dir tries the whole way"),
    ("profile profiler torch_profiler profiling profile_* profiler_*", OFF, "--profile_steps 10:12 records the steps 10 to 12: a trace for Perfetto and TensorBoard, and the heaviest operations"),
    ("report_to", OFF | {"tensorboard", "all", "['tensorboard']"}, "only a training reports its numbers: mori train, with report_to"),
    ("wandb_mode", OFF | {"online"}, "set WANDB_MODE=offline, or disabled; --report_to wandb sends a run to Weights & Biases"),
    ("wandb_project wandb_entity wandb_* project", OFF | {"huggingface", "online"}, "--report_to wandb sends a run to Weights & Biases; its own variables hold the rest, such as WANDB_PROJECT, WANDB_ENTITY and WANDB_RUN_GROUP"),
    ("trackio_* comet_* mlflow_* swanlab_* clearml_*", OFF, "--report_to knows TensorBoard and Weights & Biases; metrics.jsonl in the run's folder is there for all others"),
    ("token hub_token push_to_hub_token hf_token use_auth_token access_token auth_token api_key", _NO_TOKEN, "a token on the command line stays in the shell's history; log in once with `hf auth login`, or set HF_TOKEN"),
    ("hub_strategy hub_always_push", OFF | {"end", "every_save"}, "checkpoints are not uploaded; --push_to_hub uploads the trained model, once, at the end"),
    ("hub_revision", OFF | {"main"}, "--push_to_hub writes the branch main"),
    ("push_to_hub_organization hub_organization", OFF, "the organization is a part of the name: --hub_model_id ORGANIZATION/NAME"),
    ("push_to_hub push_to_hub_* hub_*", OFF | {"end", "every_save", "main"}, "this command uploads nothing; mori train and mori export do, with push_to_hub"),
    ("early_stopping", OFF, "--early_stopping_patience N ends a run after N evaluations in a row without an improvement"),
    ("evals_per_epoch saves_per_epoch", NEVER, "--eval_strategy epoch and --save_strategy epoch do so once an epoch, --eval_steps 0.1 ten times in the run"),
    ("logging_first_step", OFF, "--logging_steps 1 logs the first step, and each one after it"),
    ("eval_delay", OFF, "--eval_steps is the interval from the start on"),
    ("save_only_model", OFF, "a checkpoint holds what a run needs to resume; --save_total_limit bounds how many are kept"),
    ("lr_decay_iters", NEVER, "the learning rate falls over the whole run, whose length is --max_steps"),
    ("min_lr min_lr_rate", NEVER, "--lr_scheduler_type cosine_with_min_lr takes it in --lr_scheduler_kwargs"),
    ("optim_args optimizer_args", OFF, "an optimizer has its own flags: --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay"),
    ("torch_compile_backend torch_compile_mode", OFF | {"inductor", "default"}, "--torch_compile compiles with PyTorch's default backend and mode"),
    ("use_liger_kernel liger_kernel_config", OFF, "--chunked_loss, on by default, keeps the logits from memory without other kernels"),
    ("bf16_full_eval fp16_full_eval", OFF, "an evaluation computes as training does: --precision"),
    ("assistant_only_loss completion_only_loss train_on_inputs train_on_responses_only chat_template* template instruction*", OFF, "every token of the text is trained on: there are no roles; write a conversation as plain text"),
    ("stage", frozenset({"pt"}), "this is plain language modeling: reward models and preferences are not here"),
    ("task", frozenset({"train", "pretrain", "clm"}), "this is plain language modeling"),
    ("full_determinism deterministic", OFF, "on a CPU a run is deterministic to the bit already; --seed sets it"),
    ("batch", NEVER, "--per_device_train_batch_size counts the windows in one micro-batch on each device"),
    ("ddp_backend backend", frozenset({"nccl", "gloo", "none"}), "ranks communicate over NCCL on GPUs and over gloo on CPUs"),
    ("include_for_metrics include_num_input_tokens_seen batch_eval_metrics", OFF | {"all", "non_padding"}, "the metrics are loss, perplexity and bits per byte"),
    ("torch_empty_cache_steps", OFF, "if memory runs out, micro-batches are halved; --gradient_checkpointing needs less"),
    ("ignore_data_skip", OFF, "a resumed run always continues at its place in the data"),
    ("predict_with_generate", OFF, "--prompt is continued at each evaluation"),
    ("max_length", NEVER, "--max_new_tokens counts the tokens after the prompt, not prompt and answer"),
    ("num_beams num_beam_groups penalty_alpha dola_layers diversity_penalty length_penalty early_stopping constraints force_words_ids", OFF | {"1", "1.0"}, "text is drawn or taken greedily (--temperature 0): beam, contrastive and DoLa search are not here"),
    ("guidance_scale watermarking_config mirostat mirostat_* grammar* json_schema* top_nsigma top_n_sigma dynatemp* logit_bias adaptive* samplers sampler_seq*", OFF | {"1.0"}, "this sampler is not here; the others are --top_k, --top_p, --min_p, --typical_p, --xtc_probability and --dry_multiplier"),
    ("encoder_repetition_penalty encoder_no_repeat_ngram_size decoder_start_token_id", OFF | {"1.0"}, "these models have no encoder; --repetition_penalty and --no_repeat_ngram_size look at prompt and answer"),
    ("eos_token_id", OFF, "answers end at the tokens that the model's generation_config.json names; --stop_strings ends them at a text"),
    ("ignore_eos", OFF, "--min_new_tokens keeps the text from ending early"),
    ("pad_token_id bos_token_id forced_bos_token_id remove_invalid_values renormalize_logits token_healing", OFF, "the model's files decide about special tokens; --suppress_tokens and --forced_eos_token_id forbid or force one"),
    ("repeat_last_n penalty_last_n", frozenset({"-1"}), "--repetition_penalty looks at the whole text"),
    ("assistant_* is_assistant num_assistant_tokens* prompt_lookup* max_matching_ngram_size assistant_model draft* speculat* *_lookbehind use_mtp -md", OFF, "speculative decoding is not here: each token is drawn from the model itself"),
    ("system_prompt system sys", NEVER, "a plain language model has no roles: begin --prompt with what it should know"),
    ("ctx_size n_ctx -c context_length max_seq_length max_seq_len", OFF, "the context is the model's; --on_full_context slide goes on when it is full"),
]  # fmt: skip

# Names (`*` stands for anything) that are taken with any value, and the reason why they change nothing.
NEEDLESS = {
    "logging_nan_inf_filter": "a loss is logged as it is; a step whose gradient is not finite is skipped and counted",
    "overwrite_output_dir": "an earlier model is never overwritten, but kept as <output_dir>.previous; an unfinished run resumes",
    "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context num_workers preprocessing_num_workers dataset_num_proc num_proc pin_memory tokenizer_num_workers":
    "windows are read from a memory-mapped file, and text is tokenized on all cores",
    "label_names keep_linebreaks eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
    "prediction_loss_only overwrite_cache dataset_prepared_path use_fast_tokenizer use_fast add_eos_token pad_to_sequence_len":
    "the text is read, cut and scored in one way",
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph local_rank world_size":
    "ranks take it from torchrun and from the model",
    "log_level log_level_replica disable_tqdm plot_loss logging_verbosity verbose log_disable debug":
    "a run prints what it needs",
    "save_on_each_node enable_jit_checkpoint always_save_checkpoint restore_callback_states_from_checkpoint":
    "checkpoints are saved at each interval and after a signal",
    "gradient_checkpointing_kwargs activation_checkpointing_kwargs accelerator_config low_cpu_mem_usage "
    "device_map use_mps_device use_reentrant n_gpu_layers gpu_layers -ngl": "the model is loaded and run in the fastest way that is known here",
    "cache_dir": "the hub's own setting counts: HF_HOME",
    "cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile continuous_batching_config low_memory "
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate transformers_version mmap no_mmap mlock "
    "escape -e color": "the text is the same without it",
}  # fmt: skip
