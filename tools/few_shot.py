"""Few-shot classification: run methods, then use, test or export a classifier.

``run`` takes a data set and a model, or a configuration, or a file of features::

    python tools/few_shot.py run my_images --model RN50-quickgelu \
        --pretrained openai --download --shots 1 4 16
    python tools/few_shot.py fit my_images --model RN50-quickgelu --pretrained openai
    python tools/few_shot.py run clip-adapter_rn50 --cfg-options task=eurosat
    torchrun --nproc-per-node 4 tools/few_shot.py encode my_images \
        --model RN50-quickgelu --pretrained openai --out features.safetensors
    python tools/few_shot.py run --features features.safetensors
    python tools/few_shot.py predict work_dirs/RUN/classifiers/FILE.safetensors holiday/
    python tools/few_shot.py test work_dirs/RUN/classifiers/FILE.safetensors imagenet_a
    python tools/few_shot.py export work_dirs/RUN/classifiers/FILE.safetensors it.onnx
    python tools/few_shot.py check eurosat
"""

from dsnet_mm.few_shot.cli import main

if __name__ == '__main__':
    main()
