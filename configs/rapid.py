"""The rapid recipe: VICReg pretraining of a ResNet-18 on CIFAR-10 in 50 epochs.

    python -m jepa_jax.main --config=configs/rapid.py --config.optim.lr=0.707

It mirrors the reference's rapid.yaml key for key and value for value, its weights included: its
covariance term is some 160 times weaker than the VICReg paper's (see `loss` below). The guide
reports about 55 % by an online linear probe in 11.5 minutes on an RTX 4090. For a GPU: a step of
3072 images takes minutes on two CPU cores (`configs/cpu.py` is sized for those).

Keys marked "new" are not in rapid.yaml; their values reproduce what the reference does.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The reference's rapid.yaml."""
    config = ConfigDict()

    config.meta = ConfigDict()
    config.meta.seed = 42  # of everything random: parameters, order, views
    config.meta.device = "auto"  # auto, cpu or gpu
    config.meta.model_folder = ""  # the run's folder; empty: $EBJEPA_CKPTS or runs/, see README

    config.data = ConfigDict()
    config.data.dataset = "cifar10"
    config.data.batch_size = 3072  # 16 steps an epoch; the last incomplete batch is dropped
    config.data.num_workers = 16  # processes, at most one a core, that decode streamed data
    config.data.data_dir = ""  # new; empty: $EBJEPA_DSETS, $TFDS_DATA_DIR, tfds's default
    config.data.placement = "auto"  # new; device, host, stream, or auto: device when it fits
    config.data.image_size = 0  # new; images are resized and cut to this side; 0: as they are
    config.data.train_split = "train"  # new; the split or folder to train on
    config.data.unlabelled_split = ""  # new; another one to train on, whose labels are not used
    config.data.test_split = ""  # new; empty: test, else validation or val
    config.data.max_broken = 0.01  # new; share of images that may be unreadable
    config.data.view_size = 0  # new; side of the views in pixels; 0: that of the images
    config.data.num_views = 2  # new; of every image in a step: 2, 4 or 6
    config.data.num_local_crops = 0  # new; small crops of it beside those, at most 10
    config.data.local_size = 0  # new; side of these in pixels; 0: half of that of the views
    config.data.num_train = 0  # new; so many of the training images, drawn once; 0: all
    config.data.num_val = 5000  # new; training images held out from every probe, for val/*
    config.data.mean = (0.4914, 0.4822, 0.4465)  # new; the reference's constants
    config.data.std = (0.2023, 0.1994, 0.2010)  # new

    config.augment = ConfigDict()
    config.augment.scale = (0.2, 1.0)  # new; share of the image that a crop takes, from and to
    config.augment.local_scale = (0.05, 0.2)  # new; the same of a local crop
    config.augment.jitter_prob = 0.8  # new; of the four colour changes together
    config.augment.brightness = 0.4  # new; factors lie in [1 - 0.4, 1 + 0.4]
    config.augment.contrast = 0.4  # new
    config.augment.saturation = 0.2  # new
    config.augment.hue = 0.1  # new; turns of the colour circle, either way
    config.augment.grayscale_prob = 0.2  # new
    config.augment.solarize_prob = 0.1  # new
    config.augment.flip_prob = 0.5  # new
    config.augment.blur_prob = 0.0  # new; of a Gaussian blur; 0.5 is usual from 96 pixels on
    config.augment.blur_sigma = (0.1, 2.0)  # new; pixels, from and to

    config.model = ConfigDict()
    config.model.type = "resnet"  # or vit_ti, vit_s, vit_b, or one's own: my_module:my_encoder
    config.model.use_projector = True  # False applies the loss to the representation itself
    config.model.proj_hidden_dim = 4096  # eight times the features: VICReg gains from wide ones
    config.model.proj_output_dim = 4096  # the D of the loss
    config.model.stage_sizes = (2, 2, 2, 2)  # new; blocks per stage: ResNet-18
    config.model.width = 64  # new; channels of the first stage, 512 in the last
    config.model.block = "basic"  # new; or bottleneck, as in ResNet-50
    config.model.stem_kernel = 3  # new; 7, with stride 2, padding 3 and stem_pool, is ImageNet's
    config.model.stem_stride = 1  # new; 2 makes every map four times smaller
    config.model.stem_padding = 2  # new; the reference's, 34x34 maps; the usual CIFAR stem has 1
    config.model.stem_pool = False  # new; a max-pool that halves the map after the stem
    config.model.expand_dim = 0  # new; features of a 1x1 convolution after the last stage; 0: none
    config.model.stem_init = "random"  # new; or whitening, by eigenvectors of image patches
    config.model.patch_size = 4  # new; this and the next three are read by vit_* alone
    config.model.pos_embed = "learned"  # new; or sincos
    config.model.pool = "cls"  # new; the class token, or mean: over the patches
    config.model.depth = 0  # new; blocks; 0: as many as the type has

    config.model.predictor = False  # new; True predicts what a target network says, see loss
    config.model.target_ema = 0.0  # new; its momentum at the start; 0: the online network itself
    config.model.mask = "none"  # new; predicted is the other view; or blocks: masked patches (ViT)
    config.model.pred_hidden_dim = 4096  # new; BYOL's; of the predictor from view to view
    config.model.pred_dim = 384  # new; I-JEPA's; of the predictor from patches to patches
    config.model.pred_depth = 6  # new; I-JEPA's for its smallest networks

    config.loss = ConfigDict()
    config.loss.type = "vicreg"  # or sigreg, lejepa, barlow, simclr, or my_module:my_loss
    config.loss.pairing = "pairs"  # new; of many views; mean: each against the mean of the others
    config.loss.sim_coeff = 1.0  # new; fixed to 1 in the reference
    config.loss.std_coeff = 25.0  # the paper's balance is 1
    config.loss.cov_coeff = 1.0  # the paper's balance at 4096 outputs is (4096 - 1) / 25 = 164
    config.loss.sigreg_coeff = 10.0  # new; of sigreg, and the lambda of lejepa, where it is 0.05
    config.loss.num_directions = 256  # new; random ones of sigreg and lejepa, anew every step
    config.loss.redundancy_coeff = 0.005  # new; the lambda of barlow
    config.loss.temperature = 0.5  # new; of simclr
    config.loss.pred_coeff = 1.0  # new; of the predictor's term, where there is a predictor

    config.optim = ConfigDict()
    config.optim.name = "lars"  # new; lars (with clipping, as the reference), sgd, adamw, muon
    config.optim.epochs = 50.0  # a part of one, as in 1.5, ends within an epoch
    config.optim.lr = 0.707  # the guide's choice, by a search of 5 epochs inside the warm-up
    config.optim.weight_decay = 1e-4  # of weights only, never of biases and BatchNorm
    config.optim.momentum = 0.9  # new; of lars and sgd
    config.optim.warmup_epochs = 5.0  # linear
    config.optim.schedule = "step"  # new; late_epoch is the reference's: once an epoch, one late
    config.optim.warmup_start_lr = 3e-5
    config.optim.min_lr = 0.0  # where the cosine ends
    config.optim.probe_lr = 1e-3  # new; the online probe's own Adam; the reference's shares LARS

    config.training = ConfigDict()
    config.training.use_amp = True  # False computes in float32
    config.training.dtype = "bfloat16"
    config.training.remat = False  # new; True computes activations twice and keeps few of them
    config.training.microbatches = 1  # new; a batch goes through the network in so many pieces
    config.training.shard_params = False  # new; True: devices share the optimiser's state
    config.training.scan_steps = 0  # new; steps of one compiled program; 0 chooses, 1 is a loop
    config.training.on_nan = "stop"  # new; back_off goes back and halves the rate, up to 3 times
    config.training.early_stop_epochs = 0  # new; stop after so many without a better val accuracy

    config.logging = ConfigDict()
    config.logging.log_wandb = False
    config.logging.log_tensorboard = False  # new
    config.logging.log_every = 5  # epochs between lines on the screen; metrics.jsonl has them all
    config.logging.save_every = 50  # epochs between checkpoints; a stop by a signal saves too
    config.logging.save_every_minutes = 10.0  # new; what a kill may cost at most
    config.logging.stop_on_collapse = False  # new; a collapse is named in any case
    config.logging.tqdm_silent = False
    return config
