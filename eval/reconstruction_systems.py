"""Systems that `eval.reconstruction` measures: UniTok tokenizers, and autoencoders of diffusers."""

import torch

from unitok_mllm import UniTokModel


class UniTokSystem:
    """The tokenizer of a UniTok folder, or of an MLLM's.

    Attributes:
        image_size: side of the images, in pixels.
        codebooks: number of codebooks and of codes in each, (K, V).
    """

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device):
        self.model = UniTokModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        vision = self.model.config.vision_config
        self.image_size, self.codebooks = vision.image_size, (vision.num_codebooks, vision.codebook_size)

    def reconstruct(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reconstruct pixels (B, 3, H, W) in [-1, 1]; also return the codes (B, K, L)."""
        codes = self.model.encode(pixels)
        return self.model.decode(codes, tuple(pixels.shape[2:])), codes


class DiffusersSystem:
    """Any autoencoder of diffusers that takes pictures. If it has a latent distribution, the mode is decoded.

    Attributes:
        image_size: side of the images, 256 pixels.
        codebooks: (1, V) for a VQModel, else None.

    Raises:
        ValueError: it is another kind of model.
    """

    image_size = 256

    def __init__(self, model: str, subfolder: str, dtype: torch.dtype, device: torch.device):
        import diffusers  # slow: keep `--help` quick

        subfolder = {"subfolder": subfolder} if subfolder else {}
        config = diffusers.AutoModel.load_config(model, **subfolder)
        if "_class_name" not in config:
            raise ValueError(f"{model} is a {config.get('model_type')} model, not an autoencoder of diffusers")
        self.model = diffusers.AutoModel.from_pretrained(model, torch_dtype=dtype, **subfolder).to(device).eval()
        if not isinstance(self.model, diffusers.ModelMixin) or not hasattr(self.model, "encode"):
            raise ValueError(f"{model} is a {type(self.model).__name__}, not an autoencoder of diffusers")
        is_vq = isinstance(self.model, diffusers.VQModel)
        self.codebooks = (1, self.model.config.num_vq_embeddings) if is_vq else None

    def reconstruct(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reconstruct pixels (B, 3, H, W) in [-1, 1]; also return the codes (B, 1, L) of a VQModel, else None."""
        encoded, codes = self.model.encode(pixels), None
        latents = encoded["latent_dist"].mode() if "latent_dist" in encoded else encoded[0]
        if self.codebooks:
            *_, (_, _, codes) = self.model.quantize(latents)
            codes = codes.reshape(len(pixels), 1, -1)
        return self.model.decode(latents)[0], codes
