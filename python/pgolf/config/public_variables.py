"""What the public training scripts' environment variables ask for that pgolf has not, and those that change nothing.

Data alone, for environment.py. tests/data/public_variables.json lists the variables (dev/collect_variables.py).
"""

from __future__ import annotations

from dataclasses import dataclass

OFF = ("0", "", "false", "no", "off", "none")
"""Texts that turn a thing off, in any case; 0.0 is 0."""


@dataclass(frozen=True)
class Lack:
    """A thing that some scripts do and pgolf does not.

    because: a clause that says so, and says what pgolf does in its place where there is such.
    switches: the variables that turn it on; `NAME` must be off, `NAME=a|b` must be one of those texts.
    parameters: the variables that say how it is done: nothing where a switch is set as it must be.
    """

    because: str
    switches: str = ""
    parameters: str = ""


LACKS = (
    # ---- Model
    Lack("pgolf's attention has no XSA (exclusive self-attention)", "XSA_LAST_N USE_XSA XSA_ENABLED XSA_LAYERS"),
    Lack(
        "pgolf's attention is plain grouped-query attention, without gates, value residuals or other variants",
        "ATTN_OUT_GATE_ENABLED GATED_ATTENTION GATED_ATTN GATED_ATTN_ENABLED GATED_ATTN_QUANT_GATE GATE_ATTN_OUT "
        "GATE_MLP_OUT SPARSE_ATTN_GATE_ENABLED DIFF_ATTN VALUE_RESIDUAL ATTN_RES DISABLE_LAYER0_ATTN "
        "ATTN_VARIANT=standard ATTN_PROJ_TYPE=standard",
        "ATTN_OUT_GATE_SRC GATED_ATTN_INIT_STD GATE_ATTN_SRC GATE_WIDTH GATE_WINDOW LATENT_KV_DIM "
        "SPARSE_ATTN_GATE_INIT_STD SPARSE_ATTN_GATE_SCALE",
    ),
    Lack("pgolf's initial query gain is one number for all layers, QK_GAIN_INIT", "QK_GAIN_INIT_SCHEDULE"),
    Lack("pgolf's RoPE is the plain one, without YaRN or NTK scaling", "ROPE_YARN ROPE_TYPE=rope", "YARN_MAX_LEN"),
    Lack("pgolf's contexts are not stretched at evaluation", "EVAL_NTK_ALPHA"),
    Lack("pgolf has no value embeddings", "VE_ENABLED", "VE_DIM VE_LAYERS"),
    Lack(
        "pgolf's depth recurrence is that of NUM_LOOPS, LOOP_START and LOOP_END",
        "RECUR_LAYERS TRAINING_DEPTH_RECURRENCE=1|0 EVAL_DEPTH_RECURRENCE=1|0 UNTIE_LOOP_MLPS "
        "REPEAT_UNTIE_MLP=none|0 REPEAT_UNTIE_MLP_LAYERS ADAPTIVE_DEPTH",
        "LOOP_PHASE2_AT LOOP_LAYER_BITS LOOP_LAYER_CLIP_SIGMAS RECUR_START_STEP RECUR_WARMUP_STEPS DEPTH_LORA_RANK",
    ),
    Lack(
        "pgolf's attention and MLP run one after the other in every block",
        "PARALLEL_RESIDUAL PARALLEL_START_LAYER PARALLEL_RESIDUAL_START=-1",
        "PARALLEL_FINAL_LANE PARALLEL_START_LAYER_IS_PHYSICAL",
    ),
    Lack("pgolf's skip connections have weights alone, no gates", "SKIP_GATES_ENABLED"),
    Lack(
        "pgolf's smear gate is one learned vector, always there, and not a function of the input",
        "",
        "SMEAR_GATE SMEAR_GATE_ENABLED SMEAR_GATE_WIDTH",
    ),
    Lack("the model always has its smear gate", "USE_SMEARGATE=1 SMEAR=1"),
    Lack(
        "pgolf's MLP is relu squared, leaky by NEGATIVE_SLOPE",
        "ACTIVATION=relu2 MLP_ACT=relu2 MLP_ACTIVATION=relu2",
    ),
    Lack(
        "pgolf's MLP is one dense pair of matrices in every block",
        "MLP_GROUPS MLP_EVERY=1",
        "MLP_RANK",
    ),
    Lack("pgolf's logits are bounded by tanh", "SOFTCAP_TYPE=tanh"),
    Lack(
        "pgolf's logits have no rescaling, learned or searched",
        "ASYM_LOGIT_RESCALE ASYMMETRIC_LOGIT TEMP_SCALING TEMP_CALIB EVAL_TEMP=1",
    ),
    Lack("pgolf predicts the next token alone", "MTP_NUM_HEADS MTP_HEADS", "MTP_LOSS_WEIGHT"),
    Lack("pgolf has no trigram table", "TRIGRAM TRIGRAM_VOCAB_SIZE", "TRIGRAM_DIM"),
    Lack(
        "pgolf's blocks are its own, and so are its embedding and head",
        "BLOCK_TYPE=standard LOGIT_HEAD_TYPE=standard DTG_ENABLED REFINER CANON_AC_LAYERS USE_WRAP UNTIE_AT_FRACTION",
        "REFINER_KERNEL WRAP_INIT_SCALE EMBED_INNER_DIM",
    ),
    Lack("pgolf's matrices start orthogonal", "USE_ORTHO_INIT=1"),
    Lack("pgolf has no LoRA adapters while it trains", "LORA_RANK", "LORA_LR"),
    Lack(
        "pgolf trains no state-space, linear-attention or recurrent layers",
        "",
        "D_CONV D_STATE EXPAND HEADDIM NGROUPS CHUNK_SIZE NUM_ATTN_LAYERS MAMBA3_CHUNK_SIZE MAMBA3_D_STATE "
        "MAMBA3_EXPAND MAMBA3_HEADDIM MAMBA3_NGROUPS MAMBA3_OUTPROJ_NORM MAMBA3_ROPE_FRACTION GDN_CONV_SIZE "
        "GDN_EXPAND_V GDN_HEAD_DIM_RATIO GDN_LAYERS GDN_N_HEADS",
    ),
    Lack(
        "pgolf trains no ternary or binary weights",
        "TVERSKY_FEATURE_POOLS",
        "BINARIZE_ACTIVATIONS BITNET_GROUP_SIZE XNOR_GROUP_SIZE FP_STORAGE SCALE_STORAGE SIGN_COMPRESS_REG "
        "TVERSKY_MEMBERSHIP TVERSKY_NUM_FEATURES USE_INT8_KERNEL",
    ),
    Lack(
        "pgolf trains by gradients alone, without evolution strategies",
        "EGGROLL_LAYERS EGGROLL_LORA_RANK",
        "EGGROLL_LOAD EGGROLL_LR EGGROLL_RANK EGGROLL_SIGMA FITNESS_SHAPING POP_SIZE",
    ),
    Lack(
        "pgolf trains no joint-embedding (JEPA) model",
        "",
        "CE_PURE_FRAC CE_WEIGHT DETACH_TARGETS JEPA_PURE_FRAC JEPA_STEPS JEPA_WEIGHT PREDICTOR_HIDDEN_MULT "
        "PROJECTOR_TYPE SIGREG_KNOTS SIGREG_LAMBDA SIGREG_NUM_PROJ SIGREG_SCHEDULE SIGREG_WEIGHT",
    ),
    Lack(
        "pgolf trains no hierarchical (H-Net) model",
        "OUTER_LAYERS",
        "HNET_LR_DIFF RATIO_LOSS_WEIGHT TARGET_AVG_CHUNK_LEN",
    ),
    Lack(
        "pgolf's layers have weights of their own, not polynomials of the depth",
        "",
        "COEFF_LR_BASE COEFF_LR_SCALE INDEPENDENT_LR LEGENDRE_DEGREE_ATTN LEGENDRE_DEGREE_FFN LEGENDRE_GROUPS "
        "NUM_LIGHT_BLOCKS",
    ),
    # ---- Training
    Lack("pgolf's learning rate ends at 0", "MIN_LR LR_MIN_SCALE"),
    Lack("pgolf's learning rate has no warm-up", "LR_WARMUP_STEPS", "LR_START"),
    Lack(
        "pgolf's sequences and batches have one size for the whole run",
        "SEQ_LEN_SCHEDULE SEQ_LEN_START BATCH_TOKENS_START TRAIN_SEQ_SCHEDULE BATCH_WARMUP_STEPS",
        "SEQ_SCHEDULE_FRACTION BATCH_SCHEDULE_FRACTION TRAIN_SEQ_SCHEDULE_MODE SEQ_CHANGE_WARMUP_STEPS",
    ),
    Lack(
        "pgolf's Muon is the one of docs/spec.md §3",
        "MUON_EQ_R USE_GRAM_NS MUON_HUBER_WD BLOCK_LARS_TRUST CAUTIOUS_WD",
        "MUON_HUBER_DELTA BLOCK_LARS_MIN_SCALE",
    ),
    Lack("pgolf's Muon has no second moment", "", "MUON_BETA2"),
    Lack("pgolf's Muon keeps its momentum once it has risen", "", "MUON_COOLDOWN_START MUON_COOLDOWN_END"),
    Lack("Muon trains pgolf's matrices", "MATRIX_OPTIMIZER=muon", "ADAM_LR"),
    Lack("pgolf's matrices share one learning rate, MATRIX_LR", "", "BANK_SPLIT MATRIX_LR_EARLY MATRIX_LR_LATE"),
    Lack("pgolf's weight decay is constant", "WD_TAPER_FINAL_MULT=1", "WD_TAPER_START_FRAC"),
    Lack("pgolf's exponential average covers the whole run", "EMA_START_FRACTION"),
    Lack("pgolf averages snapshots (SWA_ENABLED) or exponentially (EMA_DECAY)", "LAWA_ENABLED", "LAWA_FREQ LAWA_K"),
    Lack("pgolf's snapshots count alike", "", "SWA_DECAY"),
    Lack(
        "pgolf's late QAT is that of QAT_ENABLED and QAT_START_FRAC",
        "QAT_AFTER_STEP QAT_INT6 QAT_FRACTION",
        "QAT_BITS QAT_GROUP_SIZE",
    ),
    Lack(
        "pgolf distils from nothing",
        "DISTILL_ENABLED",
        "DISTILL_ALPHA DISTILL_TEMPERATURE DISTILL_STEPS DISTILL_LR_FACTOR DISTILL_KL_CLIP",
    ),
    Lack("pgolf's loss counts all tokens alike", "COMPLEMENT_ALPHA"),
    Lack(
        "pgolf reads a folder's *_train_*.bin and *_val_*.bin from the beginning",
        "SKIP_TOKENS",
        "TRAIN_FILES VAL_FILES",
    ),
    Lack("pgolf has no other end of a run than ITERATIONS and MAX_WALLCLOCK_SECONDS", "FORCE_STOP_STEP"),
    Lack("pgolf has no schedule of caps within a run", "MIDRUN_CAP_SCHEDULE"),
    Lack("pgolf reads tokens as the shards hold them, without case operations", "CASEOPS_ENABLED"),
    Lack("pgolf's tokens are those of TOKENIZER_PATH", "", "TOKENIZER DATASETS_DIR"),
    Lack(
        "it trains, exports and scores (LOAD_MODEL_PATH scores a file, pgolf train --resume goes on with a run)",
        "RESUME_FROM EVAL_ONLY_PATH EVAL_ONLY_QUANTIZED_PATH TTT_EVAL_ONLY TTT_ONLY TTT_ONLY_EVAL QUANTIZE_ONLY "
        "PREQUANT_ONLY POST_GPTQ_EVAL_ONLY SWEEP_MODE SKIP_POST_TRAIN_EVAL",
    ),
    # ---- Bytes
    Lack(
        "pgolf rounds row by row and calibrates on no data (GPTQ)",
        "USE_GPTQ GPTQ_ENABLED GPTQ_LITE",
        "GPTQ_AR_SELFGEN GPTQ_BATCH_SIZE GPTQ_BLOCK_SIZE GPTQ_CALIBRATION_BATCHES GPTQ_CALIBRATION_MODE "
        "GPTQ_CALIB_BATCHES GPTQ_CALIB_SAMPLES GPTQ_CLIP_SIGMAS GPTQ_DAMP GPTQ_EMBED_CLIP_SIGMAS GPTQ_GEN_LEN "
        "GPTQ_GEN_TEMP GPTQ_NUM_SEQS GPTQ_TEMPERATURE HESSIAN_CLIP_LAMBDA",
    ),
    Lack("pgolf trains to the end of MAX_WALLCLOCK_SECONDS", "GPTQ_RESERVE_MS GPTQ_RESERVE_SECONDS"),
    Lack(
        "encodings are the export policy's (a RECIPE's, or that of pgolf train --config)",
        "INT6_LAYER_START=-1 INT6_LAYER_END=-1 INT4_LAYERS INT5_LAYERS INT6_LAYERS QUANT_CONFIG QUANT_BITS_EMBED "
        "QUANT_BITS_MLP INT5_MLP MIXED_QUANT=1 USE_INT6=1",
        "ATTN_CLIP_SIGMAS CLIP_MULT_EARLY CLIP_MULT_LATE CLIP_MULT_LOOP CLIP_MULT_MID EMBED_BITS EMBED_CLIP_SIGMAS "
        "INT4_STEP INT6_STEP INT8_FULL_RANGE_PATTERNS MATRIX_BITS MATRIX_CLIP_SIGMAS MLP_CLIP_SIGMAS N_INT6_LAYERS "
        "QUANT_BITS QUANT_CLIP_RANGE",
    ),
    Lack(
        "pgolf's artifacts hold no low-rank corrections of rounding (LQER)",
        "LQER_ENABLED",
        "LQER_ASYM_ENABLED LQER_ASYM_GROUP LQER_FACTOR_BITS LQER_GAIN_SELECT LQER_RANK LQER_SCOPE LQER_TOP_K",
    ),
    Lack(
        "pgolf's export scales no channels by activations (AWQ)",
        "AWQ_LITE_ENABLED",
        "AWQ_LITE_BITS AWQ_LITE_GROUP_SIZE AWQ_LITE_GROUP_TOP_K",
    ),
    Lack("pgolf's export rotates no weights", "OPTROT_ENABLED"),
    Lack("artifacts are always zstd's, at level 22", "COMPRESSOR=zstd USE_ZSTD=1 ZSTD_LEVEL=22 USE_BROTLI USE_LZMA"),
    Lack("pgolf prunes the share PRUNE_FRAC of the smallest weights", "PRUNE_RATIO", "TARGET_MB"),
    # ---- Score
    Lack(
        "pgolf's test-time training is that of eval.method = \"ttt\" (pgolf eval --method ttt), not the scripts' own",
        "TTT_ENABLED PHASED_TTT_ENABLED TTT_STEPS",
        "CORR_WEIGHT_LR GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_CHUNK_TOKENS GLOBAL_TTT_DOC_LIMIT GLOBAL_TTT_EPOCHS "
        "GLOBAL_TTT_GRAD_CLIP GLOBAL_TTT_LR GLOBAL_TTT_MOMENTUM GLOBAL_TTT_MUON_NESTEROV GLOBAL_TTT_MUON_NS_STEPS "
        "GLOBAL_TTT_OPTIMIZER GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR "
        "PHASED_TTT_NUM_PHASES PHASED_TTT_PREFIX_DOCS TTT_BATCH_SEQS TTT_BETA1 TTT_BETA2 TTT_CHUNK_TOKENS "
        "TTT_DEBUG_BYPASS TTT_DOC_LIMIT TTT_ENTROPY_HIGH TTT_ENTROPY_LOW TTT_EPOCHS TTT_EVAL_BATCHES "
        "TTT_FREEZE_BLOCKS TTT_FREEZE_LAYERS TTT_GRAD_CLIP TTT_GRAD_STEPS TTT_GRAD_STEPS_CLEAN TTT_K_LORA "
        "TTT_LOCAL_LR_MULT TTT_LORA_ALPHA TTT_LORA_EMA_DECAY TTT_LR TTT_MASK TTT_MLP_LORA TTT_MOMENTUM TTT_NS_STEPS "
        "TTT_OPTIMIZER TTT_O_LORA TTT_Q_LORA TTT_SHORT_BETA2 TTT_SHORT_CHUNK_SIZE TTT_SHORT_DOC_LEN "
        "TTT_SHORT_LORA_ENABLED TTT_SHORT_LORA_LR TTT_SHORT_LORA_RANK TTT_SHORT_SCORE_FIRST_ENABLED "
        "TTT_SHORT_SCORE_FIRST_STEPS TTT_SHORT_WEIGHT_DECAY TTT_TRAIN_MAX_DOC_LEN TTT_TRAIN_MIN_DOC_LEN "
        "TTT_UPDATE_EVERY TTT_V_LORA TTT_WARM_START_A TTT_WARM_START_MEAN_DOC_LEN TTT_WARM_START_MEAN_ENABLED "
        "TTT_WARM_START_MEAN_MOMENTUM TTT_WEIGHT_DECAY",
    ),
    Lack(
        "pgolf's scoring fits nothing else to the text",
        "SLOT_ENABLED ETLB_ENABLED",
        "SLOT_LR SLOT_STEPS ETLB_LR ETLB_STEPS ETLB_CLIP",
    ),
    Lack(
        "pgolf scores by the model alone, without n-gram statistics of the text",
        "NGRAM_TILT_ENABLED NGRAM_EVAL_ORDER",
        "AGREE_ADD_BOOST NGRAM_AGREE_BONUS NGRAM_BASE_BETA NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE "
        "NGRAM_WITHIN_BETA NGRAM_WITHIN_THRESHOLD NGRAM_WORD_BETA NGRAM_WORD_THRESHOLD NGRAM_HINT_PRECOMPUTE_OUTSIDE "
        "TOKEN_BOOST TOKEN_ORDER TOKEN_THRESHOLD WITHIN_BOOST WITHIN_TAU WORD_BOOST WORD_NORMALIZE WORD_ORDER "
        "WORD_TAU NGRAM_EVAL_MIN_COUNT NGRAM_EVAL_BUCKETS NGRAM_EVAL_MIN_ORDER NGRAM_EVAL_ALPHA NGRAM_EVAL_ALPHA_MIN "
        "NGRAM_EVAL_ALPHA_MAX NGRAM_EVAL_ENTROPY_CENTER NGRAM_EVAL_ENTROPY_SCALE NGRAM_EVAL_ADAPTIVE "
        "NGRAM_EVAL_MAX_SECONDS NGRAM_CHUNK_TOKENS NGRAM_ENTROPY_SHIFT NGRAM_ORDER_MULTS NGRAM_BUCKETS "
        "CUBRIC_CADENCE",
    ),
    Lack(
        "pgolf scores windows of text, and keeps no state between them", "EVAL_OVERLAP EVAL_STATE_RESET EVAL_STATEFUL"
    ),
    Lack(
        "pgolf scores the whole validation split, its end too",
        "VAL_MAX_TOKENS VAL_MAX_BATCHES VAL_DOC_FRACTION=1 EVAL_INCLUDE_TAIL=1",
    ),
    Lack("EVAL_STRIDE is how far apart windows start", "", "STRIDE"),
    Lack("sets of defaults are recipes (RECIPE)", "", "MODE"),
)

NO_EFFECT = {
    "pgolf compiles nothing while it runs, and chooses its own kernels": (
        "COMPILE COMPILE_ENABLED COMPILE_FULLGRAPH COMPILE_MODE COMPILE_MODEL COMPILE_SHAPE_WARMUP "
        "COMPILE_SHAPE_WARMUP_ITERS COMPILE_SHAPE_WARMUP_LOOP_MODES DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT "
        "DYNAMO_CACHE_SIZE_LIMIT FUSED_CE_ENABLED LOGIT_CHUNK_TOKENS MLX_MAX_MICROBATCH_TOKENS TORCH_COMPILE "
        "USE_COMPILE USE_TORCH_COMPILE USE_TRITON_KERNEL"
    ),
    "runs/RUN_ID holds what a run writes, and logs/RUN_ID.txt its log": (
        "ARTIFACT_DIR CHECKPOINT_DIR MODEL_SAVE_PATH OUT_DIR SAVE_QUANT_STATE TTT_OUTPUT_DIR WANDB_MODE"
    ),
    "pgolf's log says what the run does, in its own words": (
        "CHURN_LOG_EVERY MIDRUN_CAP_LOG_UPDATES PERGROUP_ROUNDTRIP_CHECK TTT_HEARTBEAT_SECONDS"
    ),
    "the size of an evaluation's batch changes memory and speed alone": "EVAL_BATCH_SIZE",
}
"""Reason → the variables that change neither the model nor its training, its bytes or its score."""
