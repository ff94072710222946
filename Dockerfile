# tpcolocate on SGLang's own image: unpatched SGLang, with nothing of it changed or rebuilt.
#
#   docker build -t tpcolocate .
#   docker run --rm --gpus all --shm-size 16g --ulimit nofile=65536 tpcolocate
#
# The second command runs the doctor, which says whether a job would work with these flags; docs/howto/docker.md has the
# reasons for them.  This file was written without Docker at hand: it has not been built.  A test checks what it names.

FROM lmsysorg/sglang:v0.5.21

# The distribution may protect the image's Python from pip.
ENV PIP_BREAK_SYSTEM_PACKAGES=1

WORKDIR /opt/tpcolocate
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY tpcolocate tpcolocate
COPY examples examples

# The image's torch and transformers stay: SGLang pins them.  Without the extra `sglang`, which is there already.
RUN python3 -m pip list --format freeze | grep -E '^(torch|transformers)==' > /tmp/held.txt \
 && python3 -m pip install --no-cache-dir --constraint /tmp/held.txt '.[trl,hf,plot]' \
 && rm /tmp/held.txt

WORKDIR /workspace
CMD ["python3", "-m", "tpcolocate", "doctor"]
