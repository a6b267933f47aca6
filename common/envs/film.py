"""Films of MuJoCo environments; and `mujoco` itself, whose import raises BadInput where MUJOCO_GL names no renderer."""

import importlib
import os
import subprocess
import sys
from functools import cache
from unittest import mock

import numpy as np

from common.envs.protocol import BadInput

try:
    import mujoco
except Exception as error:  # importing mujoco loads the renderer that MUJOCO_GL names
    if not os.environ.get("MUJOCO_GL"):
        raise
    raise BadInput(f"MuJoCo does not start with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}") from error


class Film:
    """Draws a meta-episode, step by step, for an animated GIF. Raises BadInput where MuJoCo cannot draw.

    camera: its name in the model; `upside_down`: how it hangs. seconds: of a step. every: steps from one picture to the
    next; the last of an episode's `horizon` steps has one too.
    """

    def __init__(self, model, camera, horizon, seconds, every=5, upside_down=False):
        with mock.patch.object(mujoco.gl_context, "GLContext", drawing_context()):
            self.renderer = mujoco.Renderer(model, height=240, width=320)
        for effect in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[effect] = 0  # the two take three quarters of the time, without a GPU
        self.camera, self.horizon, self.seconds, self.every = camera, horizon, seconds, every
        self.upside_down = upside_down
        self.pictures, self.durations = [], []

    def step(self, t, data, success, mark=None):
        """After step t, counted from 0. mark: where to draw a ball, (3), in m."""
        from PIL import Image, ImageDraw

        episode, step = divmod(t, self.horizon)
        self.success = bool(success) or (step > 0 and self.success)
        last = step == self.horizon - 1
        if step % self.every and not last:
            return
        self.renderer.update_scene(data, camera=self.camera)
        if mark is not None:
            scene = self.renderer.scene
            ball, size, colour = mujoco.mjtGeom.mjGEOM_SPHERE, (0.018, 0, 0), (0.1, 0.9, 0.2, 1)
            mujoco.mjv_initGeom(scene.geoms[scene.ngeom], ball, size, mark, np.eye(3).flatten(), np.float32(colour))
            scene.ngeom += 1
        picture = self.renderer.render()
        picture = Image.fromarray(picture[::-1, ::-1] if self.upside_down else picture)
        caption = f"episode {episode + 1}, step {step + 1}{', success' if self.success else ''}"
        colour = "lightgreen" if self.success else "white"
        ImageDraw.Draw(picture).text((8, 6), caption, fill=colour, font_size=14)
        self.pictures.append(picture)
        self.durations.append(800 if last else 1000 * self.seconds * self.every)  # milliseconds

    def save(self, path):
        """The GIF, at the speed of what it shows."""
        self.renderer.close()
        self.pictures[0].save(path, save_all=True, append_images=self.pictures[1:], duration=self.durations, loop=0)


@cache
def drawing_context():
    """A class of OpenGL contexts in which MuJoCo draws here, without a screen.

    MuJoCo settles on one when it is imported, by MUJOCO_GL: by default one that needs a screen. Worker processes
    import it as well and never draw, so MUJOCO_GL stays as it is, and the choice is made when the first picture is due:
    what MUJOCO_GL says, else the first that draws of EGL (a GPU, or Mesa), OSMesa (Mesa, on the CPU) and MuJoCo's
    default. Each is tried in a process of its own, since a failed one cannot be unloaded, and may take its process
    with it.
    Raises BadInput where none draws.
    """
    asked = os.environ.get("MUJOCO_GL", "")
    trial = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).render()"
    for name in [asked] if asked else ["egl", "osmesa", ""]:
        environment = {**os.environ, "MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", trial], env=environment, capture_output=True).returncode == 0:
            return (mujoco.gl_context if name == asked else importlib.import_module(f"mujoco.{name}")).GLContext
    raise BadInput(
        f"MuJoCo cannot draw here with {f'MUJOCO_GL={asked}' if asked else 'EGL, OSMesa or a screen'}: "
        "install libegl1 or libosmesa6 (apt-get install), and leave MUJOCO_GL unset or set it to egl or osmesa"
    )
