FROM python:3.13-slim

WORKDIR /usr/src/smtp-relay

COPY smtp_oauth_relay.py ./

# The relay starts as root to read a key that only root can read, and then becomes RUN_AS.
# With the threshold glibc returns large messages to the system as soon as they are freed.
ENV RUN_AS=nobody PYTHONDONTWRITEBYTECODE=1 MALLOC_MMAP_THRESHOLD_=1048576

EXPOSE 8025

# Sends EHLO and QUIT to the listener, because a running process can still be stuck.
HEALTHCHECK --interval=60s --timeout=10s --start-period=10s \
    CMD ["python", "-c", "import os, smtplib; s = smtplib.SMTP(os.environ.get('LISTEN_ADDRESS') or 'localhost', int(os.environ.get('SMTP_PORT') or 8025), local_hostname='localhost', timeout=8); s.ehlo_or_helo_if_needed(); s.quit()"]

CMD ["python", "smtp_oauth_relay.py"]
