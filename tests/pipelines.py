"""Tiny complete text-to-image pipelines on disk, made in seconds, offline: SDXL, SANA, PRX, Stable Diffusion 3."""

import json

import pytest
import torch

from nano_dmd import train
from nano_dmd.engine import progress
from nano_dmd.engine.files import load_tensors

PROMPTS = ["a red cube", "a cat on a mat", "fog", "two dogs"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
RUN = ["--device", "cpu", "--batch", "4", "--steps", "2", "--critic_steps", "2", "--warmup", "0", "--lr_generator", "1e-3",
       "--lr_critic", "1e-3", "--pairs", "4", "--pair_steps", "2", "--save_every", "1", "--sample_every", "2", "--log_every", "2"]
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)


def slow(cases):
    """pytest's parameters for these cases, which run with the slow tests alone."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def clip_tokenizer(folder, pad="<|endoftext|>"):
    """CLIP's byte-pair tokenizer over single letters, and how many words it knows."""
    from transformers import CLIPTokenizer

    words = ["!", *LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        model_max_length=77, tokenizer_class="CLIPTokenizer", bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        pad_token=pad, unk_token="<|endoftext|>")))
    return CLIPTokenizer.from_pretrained(folder), len(words)


def clip(kind, count, width=32, **more):
    from transformers import CLIPTextConfig

    return kind(CLIPTextConfig(
        vocab_size=count, hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=count - 2, eos_token_id=count - 1, pad_token_id=count - 1, projection_dim=width, **more))


def kl(channels, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, sample_size=64, **more)


def gemma_tokenizer():
    from transformers import GemmaTokenizerFast

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *LETTERS, "."]
    found = GemmaTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, merges=[], add_bos_token=True)
    return found, len(found)


def awake(network):
    """The network with noise on all weights: fresh transformers answer zero."""
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return network


def sdxl(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words, count = clip_tokenizer(folder / "made")
    unet = UNet2DConditionModel(
        sample_size=8, cross_attention_dim=64, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=(2, 4),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32)
    return StableDiffusionXLPipeline(
        kl(4, scaling_factor=0.13025, force_upcast=True), clip(CLIPTextModel, count),
        clip(CLIPTextModelWithProjection, count, hidden_act="gelu"), words, clip_tokenizer(folder / "made2", "!")[0], unet,
        EulerDiscreteScheduler(**SCHEDULE), add_watermarker=False)


def sana(folder):
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    words, count = gemma_tokenizer()
    text = Gemma2Model(Gemma2Config(
        vocab_size=count, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8))
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3, encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
        encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)), scaling_factor=0.41407)
    network = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16, sample_size=8)
    return SanaPipeline(words, text, vae, awake(network), DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0))


def prx(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel
    from transformers import T5GemmaConfig, T5GemmaModuleConfig
    from diffusers.pipelines.prx import T5GemmaEncoder

    words, count = gemma_tokenizer()
    words.model_max_length = 12
    small = dict(vocab_size=count, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, layer_types=["full_attention"] * 2)
    config = T5GemmaConfig(encoder=T5GemmaModuleConfig(**small).to_dict(), decoder=T5GemmaModuleConfig(**small).to_dict(),
                           vocab_size=count)
    network = PRXTransformer2DModel(in_channels=4, patch_size=1, context_in_dim=16, hidden_size=32, num_heads=2, depth=4,
                                    axes_dim=[8, 8])
    pipeline = PRXPipeline(awake(network), FlowMatchEulerDiscreteScheduler(shift=3.0), T5GemmaEncoder(config.encoder), words,
                           kl(4, scaling_factor=0.3611, shift_factor=0.1159), default_sample_size=64)
    pipeline.as_published = config
    return pipeline


def sd3(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

    words, count = clip_tokenizer(folder / "made")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in LETTERS)]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0)
    text = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm")
    return StableDiffusion3Pipeline(
        awake(network), FlowMatchEulerDiscreteScheduler(shift=3.0), kl(4, scaling_factor=1.5305, shift_factor=0.0609),
        clip(CLIPTextModelWithProjection, count, 16), words, clip(CLIPTextModelWithProjection, count, 32),
        clip_tokenizer(folder / "made2", "!")[0], text, t5)


MAKERS = dict(sdxl=sdxl, sana=sana, prx=prx, sd3=sd3)


def pipeline(kind, folder):
    """The path of a saved pipeline of one of MAKERS, with random weights and 8x8 latents."""
    torch.manual_seed(0)
    made = MAKERS[kind](folder)
    made.save_pretrained(folder / kind)
    if hasattr(made, "as_published"):              # diffusers issue 13142: it saves PRX's encoder so that nothing loads it
        made.as_published.save_pretrained(folder / kind / "text_encoder")
        index = json.loads((folder / kind / "model_index.json").read_text())
        index["text_encoder"][0] = "prx"                              # as diffusers' converter writes it
        (folder / kind / "model_index.json").write_text(json.dumps(index))
    return str(folder / kind)


def stopped_and_resumed(argv, tmp_path):
    """Weights of a run, which a run that was stopped after its first step and resumed also ends with, to the bit."""
    train.main([*argv, "--out", str(tmp_path / "whole")])
    torch.manual_seed(123)

    class Stop(Exception):
        pass

    def stop(*args, real=progress.save_checkpoint):
        real(*args)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(progress, "save_checkpoint", stop)
        train.main([*argv, "--out", str(tmp_path / "parts")])
    train.main([*argv, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (load_tensors(tmp_path / name / "generator.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    return whole
