FROM python:3.13-slim

WORKDIR /usr/src/smtp-relay

COPY smtp_oauth_relay.py ./

# It starts as root to read a key that only root may read, and then becomes RUN_AS.
# glibc returns blocks of this size, such as large messages, to the system when they are freed.
ENV RUN_AS=nobody PYTHONDONTWRITEBYTECODE=1 MALLOC_MMAP_THRESHOLD_=1048576

EXPOSE 8025

# Says EHLO and QUIT to the listener: a process that does not answer is not healthy.
HEALTHCHECK --interval=60s --timeout=10s --start-period=10s \
    CMD ["python", "-c", "import os, smtplib; s = smtplib.SMTP(os.environ.get('LISTEN_ADDRESS') or 'localhost', int(os.environ.get('SMTP_PORT') or 8025), local_hostname='localhost', timeout=8); s.ehlo_or_helo_if_needed(); s.quit()"]

CMD ["python", "smtp_oauth_relay.py"]
